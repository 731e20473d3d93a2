"""The wire: what requests may hold and what answers hold."""

from datetime import datetime
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from service.example import IMAGE, MASK

__all__ = [
    "Batch",
    "BatchQuery",
    "Batches",
    "Estimate",
    "Health",
    "ImputeOptions",
    "ImputeRequest",
    "ImputeResponse",
    "Imputed",
    "Item",
    "LogLikelihoodOptions",
    "LogLikelihoodRequest",
    "LogLikelihoodResponse",
    "ModelSummary",
    "Models",
    "ProblemDocument",
    "Quality",
    "SamplesRequest",
    "SamplesResponse",
    "Scored",
    "TruthItem",
]

MAX_IMAGES, MAX_DRAWS, MAX_PARTICLES, MAX_SAMPLES, MAX_SEED = 256, 100, 1_000_000, 256, 2**53 - 1
MAX_LEVELS, MOST_FIELDS = 9, 64


def _text_or_lists(value: Any) -> str | list[Any]:
    """One error where a union has one for each of its members."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("pixels", "base64 text or nested lists")
    return value


Encoding = Literal["png", "npy", "list"]
Encoded = Annotated[
    str | list[Any],
    PlainValidator(_text_or_lists, json_schema_input_type=str | list[Any]),
]
Pixels = Annotated[
    Encoded,
    Field(
        description="Base64 of a PNG, JPEG, WebP, TIFF (8-bit, one frame) or NPY file, or nested "
        "lists of rows. Lists hold numbers from 0 to 1; NPY holds floats from 0 to 1, or "
        "integers: 0 and 1 when none is larger, levels to 255 otherwise. "
        "Missing by themselves: alpha 0, null in lists, NaN in NPY."
    ),
]
MaskPixels = Annotated[
    Encoded,
    Field(
        description="Which pixels are missing: levels above 127 in a picture, true or 1 in "
        "arrays. Same size as the image."
    ),
]
ModelName = Annotated[
    str | None, Field(description="A name of /v1/models; the server's own choice if left out.")
]
Particles = Annotated[
    StrictInt,
    Field(ge=1, le=MAX_PARTICLES, description="Importance samples an image; more are more exact."),
]
Tolerance = Annotated[
    float | None,
    Field(
        ge=0.001,
        le=10,
        description="A standard error of the log-likelihood, in nats, at which no more particles "
        "are drawn, where it may be believed; particles is then the most that may be.",
    ),
]
Quality = Annotated[
    Literal["auto", "fast", "standard", "high"],
    Field(
        description="How particles are found: fast, from the encoder; standard, from Gaussians at "
        "modes of the posterior; high, by annealed chains, at several times the time of "
        "standard; auto, standard, and high where that is in doubt. The answer says which."
    ),
]
EstimatorName = Annotated[
    Literal["prior", "importance", "jackknife", "jackknife-2", "adaptive", "annealed"] | None,
    Field(
        description="Of log p(observed), in place of a quality: importance is a lower bound in "
        "expectation; jackknife and jackknife-2 take its bias away, and need more than 64 and 128 "
        "particles; adaptive moves its proposal first; annealed is what high has; prior is naive."
    ),
]
Seed = Annotated[
    StrictInt | None,
    Field(
        ge=0,
        le=MAX_SEED,
        description="The same request with the same seed has the same answer to the last bit. "
        "Drawn and returned if left out.",
    ),
]


class Strict(BaseModel):
    """A request, in which an unknown field is an error, and a thousand of them are one."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, told: Any) -> Any:
        if isinstance(told, dict) and len(cast("dict[str, Any]", told)) > MOST_FIELDS:
            raise PydanticCustomError("fields", "at most {most} fields", {"most": MOST_FIELDS})
        return cast("Any", told)


class Item(Strict):
    """An image with holes."""

    id: str | None = Field(None, max_length=128, description="Comes back with the result.")
    image: Pixels
    mask: MaskPixels | None = None


class TruthItem(Item):
    """An image with holes and, where it is known, what was behind them."""

    truth: Pixels | None = Field(
        None, description="The complete image: log p(missing | observed) is returned of it."
    )


class ImputeOptions(Strict):
    """How images are completed."""

    model: ModelName = None
    draws: StrictInt = Field(1, ge=0, le=MAX_DRAWS, description="Completions an image.")
    particles: Particles = 1000
    tolerance: Tolerance = None
    quality: Quality = "auto"
    seed: Seed = None
    outputs: Annotated[
        list[Literal["mean", "draws", "std", "median", "quantiles"]], Field(max_length=5)
    ] = ["mean", "draws", "std"]
    levels: Annotated[
        list[Annotated[float, Field(gt=0, lt=1)]],
        Field(min_length=1, max_length=MAX_LEVELS, description="Of the quantiles."),
    ] = [0.05, 0.95]
    encoding: Encoding = "png"


class ImputeRequest(ImputeOptions):
    """Images to complete."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"images": [{"id": "a", "image": IMAGE, "mask": MASK}], "draws": 3, "seed": 7}
            ]
        }
    )
    images: list[Item] = Field(min_length=1, max_length=MAX_IMAGES)


class LogLikelihoodOptions(Strict):
    """How images are scored."""

    model: ModelName = None
    particles: Particles = 1000
    tolerance: Tolerance = None
    quality: Quality = "auto"
    estimator: EstimatorName = None
    seed: Seed = None


class LogLikelihoodRequest(LogLikelihoodOptions):
    """Images to score."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": [{"image": IMAGE, "mask": MASK}], "seed": 7}]}
    )
    images: list[TruthItem] = Field(min_length=1, max_length=MAX_IMAGES)


class SamplesRequest(Strict):
    """How many images to draw from the model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"count": 4, "seed": 7}]})
    model: ModelName = None
    count: StrictInt = Field(1, ge=1, le=MAX_SAMPLES)
    seed: Seed = None
    encoding: Encoding = "png"


class Estimate(BaseModel):
    """An estimate of a log-probability in nats, with what is known of its error."""

    value: float
    standard_error: float = Field(description="Monte Carlo, by the delta method.")
    effective_sample_size: float
    pareto_k: float | None = Field(
        description="Shape of the weights' tail; null with too few particles to tell."
    )
    reliable: bool = Field(description="Whether the standard error may be believed: k below 0.7.")
    particles: int = Field(description="That were used, or chains where it is annealed.")
    estimator: str
    kind: str = Field(
        description="What the number is: a lower bound in expectation, debiased, "
        "a ratio of means, a difference, or exact."
    )
    acceptance: float | None = Field(
        description="The part of the chains' transitions that were accepted; null without chains."
    )


QualityUsed = Annotated[
    Literal["fast", "standard", "high"] | None,
    Field(description="That was used; null where an estimator was asked for."),
]


class Imputed(BaseModel):
    """A completed image; outputs that were not asked for are null."""

    id: str | None
    mean: Any = Field(description="Posterior mean where missing; observed pixels as they came.")
    draws: list[Any] | None = Field(description="Independent completions, each a possible image.")
    std: Any = Field(description="Posterior standard deviation; zero where observed.")
    median: Any = Field(description="Of each pixel by itself; of a binary one it is the mode.")
    quantiles: list[Any] | None = Field(description="Of each pixel by itself, at the levels.")
    log_likelihood: Estimate
    quality: QualityUsed
    seed: int = Field(description="With it this image alone gets this result again.")
    binarised: bool = Field(description="Whether grey levels were cut at 127 for the model.")


class ImputeResponse(BaseModel):
    """The results, in the order of the images."""

    model: str
    results: list[Imputed]


class Scored(BaseModel):
    """The log-likelihood of an image's observed pixels."""

    id: str | None
    log_likelihood: Estimate
    conditional: Estimate | None = Field(
        description="log p(missing | observed) of the truth, by self-normalised weights: "
        "no particles can flatter it."
    )
    difference: Estimate | None = Field(
        description="The same as log p(truth) - log p(observed): as good as the two are."
    )
    quality: QualityUsed
    seed: int
    binarised: bool


class LogLikelihoodResponse(BaseModel):
    """The results, in the order of the images."""

    model: str
    results: list[Scored]


class SamplesResponse(BaseModel):
    """Images drawn from the model."""

    model: str
    samples: list[Any]
    seed: int


class BatchQuery(Strict):
    """What is to be done with a batch: the options of an operation, and the kind of results."""

    operation: Literal["impute", "log-likelihood"]
    format: Literal["jsonl", "parquet", "npz", "zip"] = Field(
        "jsonl", description="Of the results; zip is one of PNG files."
    )
    model: str | None = None
    particles: int | None = None
    tolerance: float | None = None
    quality: str | None = None
    seed: int | None = None
    estimator: str | None = Field(None, description="Of log-likelihood.")
    draws: int | None = Field(None, description="Of impute, and so are those that follow.")
    outputs: list[str] | None = Field(
        None, description="Each of mean, draws, std, median and quantiles that is wanted."
    )
    levels: list[float] | None = None
    encoding: str | None = Field(None, description="png, npy or list, in lines and tables.")


class Batch(BaseModel):
    """How a batch is."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    operation: str
    options: dict[str, Any] = Field(description="All of them, with the seed.")
    format: str
    model: str
    weights_sha256: str = Field(description="Of the model for all of the batch.")
    bytes: int
    total: int | None = Field(description="Items; null until the file has been gone through.")
    done: int = Field(description="Items with results.")
    failed: int = Field(description="Items with a line among the errors.")
    rate: float | None = Field(description="Items a second.")
    eta: float | None = Field(description="Seconds that are left at this rate.")
    problem: str | None = Field(description="Why it failed, or what it waits for.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None = Field(description="When it is forgotten with its results.")


class Batches(BaseModel):
    """Some of the batches, the latest first."""

    batches: list[Batch]
    next: int | None = Field(description="The offset of the next ones; null where there are none.")


class ModelSummary(BaseModel):
    """A model that can be asked for by name."""

    name: str
    default: bool
    image_shape: tuple[int, int, int]
    likelihood: str
    objective: str
    missing: str
    weights_sha256: str


class Models(BaseModel):
    """The models of this server."""

    models: list[ModelSummary]


class Health(BaseModel):
    """Whether the service does its work."""

    status: Literal["ok"]


class ProblemField(BaseModel):
    """A field of the request that was wrong."""

    field: str
    expected: str
    got: str


class ProblemDocument(BaseModel):
    """An RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[ProblemField]
