"""The networks' shapes, sizes and fresh weights."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.latent import Architecture
from model.masks import Incomplete
from model.networks import (
    DECODERS,
    ENCODERS,
    Gated,
    GatedConvDecoder,
    GatedConvEncoder,
    ImageShape,
)
from model.noise import Noise
from model.objectives import OBJECTIVES, Objective, ascend

LIKE = torch.zeros(())
SHAPES: list[ImageShape] = [(1, 28, 28), (3, 5, 7), (1, 1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def _encoder(name: str, shape: ImageShape = (1, 28, 28), *, seed: int = 0) -> nn.Module:
    generator = Noise(seed).generator()
    return ENCODERS[name](image_shape=shape, latent=40, hidden=(300,), generator=generator)


def _decoder(name: str, shape: ImageShape = (1, 28, 28), *, seed: int = 0) -> nn.Module:
    generator = Noise(seed).generator()
    return DECODERS[name](image_shape=shape, latent=40, hidden=(300,), generator=generator)


@every_shape
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_any_image_to_a_mean_and_a_width(name: str, shape: ImageShape):
    """Of every filling of every image there are as many means and widths as latents."""
    mean, log_std = _encoder(name, shape)(Noise(1).uniform(2, 3, *shape, like=LIKE))

    assert mean.shape == log_std.shape == (2, 3, 40)


@every_shape
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_take_latents_to_planes_of_the_images_shape(name: str, shape: ImageShape):
    """Of every particle of every image there is a plane a channel."""
    assert _decoder(name, shape)(Noise(1).normal(2, 3, 40, like=LIKE)).shape == (2, 3, *shape)


@every_shape
@pytest.mark.parametrize("name", DECODERS)
def test_a_frozen_decoder_gives_what_it_gave(name: str, shape: ImageShape):
    """However its weights are laid out, the planes are the same to single precision."""
    architecture = Architecture(image_shape=shape, decoder=name, hidden=(30, 20))
    model = architecture.build(Noise(0))
    latents = Noise(1).normal(2, 64, 40, like=LIKE)
    with torch.inference_mode():
        before = model.decode(latents)
        after = model.frozen().decode(latents)

    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_particle_is_decoded_by_a_frozen_model_alone_as_it_is_among_others():
    """The bits of a block of 64 particles are the same in a batch of any size."""
    model = Architecture().build(Noise(0)).frozen()
    latents = Noise(1).normal(32, 64, 40, like=LIKE)
    together = model.decode(latents)

    for count in (1, 3, 16):
        assert torch.equal(model.decode(latents[:count]), together[:count])


def test_a_frozen_model_of_another_precision_is_not_packed():
    """Double precision stays double, and the gradients of latents are still there."""
    model = Architecture(hidden=(30, 20)).build(Noise(0)).double().frozen()
    latents = Noise(1).normal(2, 3, 40, like=LIKE).double().requires_grad_()
    with torch.no_grad():
        assert model.decode(latents).dtype == torch.float64
    (slope,) = torch.autograd.grad(model.decode(latents).sum(), latents)

    assert slope.abs().sum() > 0


def test_a_copy_of_a_frozen_model_can_be_trained():
    """It is the same function, and where its weights change it changes with them."""
    model = Architecture(hidden=(30, 20)).build(Noise(0)).frozen()
    copy = deepcopy(model).requires_grad_()
    latents = Noise(1).normal(64, 40, like=LIKE)
    with torch.inference_mode():
        before = model.decode(latents)
        assert (copy.decode(latents) - before).abs().max() < 1e-5
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    with torch.inference_mode():
        assert copy.decode(latents).abs().max() == 0
        assert torch.equal(model.decode(latents), before)


@pytest.mark.parametrize("name", DECODERS)
def test_a_frozen_decoder_has_its_derivatives(name: str):
    """Forward ones too, without gradients, which are what the modes are climbed to by."""
    model = Architecture(image_shape=(1, 5, 4), decoder=name, hidden=(30, 20)).build(Noise(0))
    latents = Noise(1).normal(3, 40, like=LIKE)

    def decoded(one: Tensor) -> Tensor:
        return model.decode(one[None])[0]

    with torch.no_grad():
        before = torch.func.vmap(torch.func.jacfwd(decoded))(latents)
        model.frozen()
        after = torch.func.vmap(torch.func.jacfwd(decoded))(latents)

    assert before.abs().sum() > 0
    torch.testing.assert_close(after, before)


def test_no_weight_of_a_frozen_model_has_a_gradient():
    """Frozen means that nothing of it is learned."""
    assert not any(p.requires_grad for p in Architecture().build(Noise(0)).frozen().parameters())


@every_shape
@pytest.mark.parametrize("name", ENCODERS)
def test_an_image_is_encoded_alone_as_it_is_among_others(name: str, shape: ImageShape):
    """Leading axes are no part of the computation."""
    encoder, images = _encoder(name, shape), Noise(1).uniform(2, 3, *shape, like=LIKE)
    together = torch.stack(encoder(images))
    alone = torch.stack([torch.stack(encoder(image[None])) for image in images.flatten(0, 1)], 1)

    torch.testing.assert_close(together.flatten(1, 2), alone[:, :, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_a_particle_is_decoded_alone_as_it_is_among_others(name: str):
    """Leading axes are no part of the computation."""
    decoder, latents = _decoder(name, (3, 5, 7)), Noise(1).normal(2, 3, 40, like=LIKE)
    alone = torch.stack([decoder(z[None]) for z in latents.flatten(0, 1)], 0)

    torch.testing.assert_close(decoder(latents).flatten(0, 1), alone[:, 0], rtol=1e-4, atol=1e-4)


def _layers(network: nn.Module) -> list[tuple[object, ...]]:
    """Each layer's sizes: of a convolution with the side of its kernel and its stride."""
    found = list[tuple[object, ...]]()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.kernel_size[0] == layer.kernel_size[1]
            assert layer.stride[0] == layer.stride[1]
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
            found.append(sizes)
        if isinstance(layer, nn.Linear):
            found.append((layer.in_features, layer.out_features))
    return found


def test_the_gated_encoder_is_that_of_the_slides():
    """Five gated convolutions end in 294 numbers, of which come 40 means and 40 variances.

    A gated layer has twice its features, one half to open and shut the other.
    """
    assert _layers(_encoder("gated-conv")) == [
        (1, 2 * 32, 7, 1),
        (32, 2 * 32, 3, 2),
        (32, 2 * 64, 5, 1),
        (64, 2 * 64, 3, 2),
        (64, 2 * 6, 3, 1),
        (294, 2 * 40),
    ]


def test_the_gated_decoder_is_that_of_the_slides():
    """Gated dense layers 40-300-784, four gated 3×3 convolutions of 64 channels, then one 1×1.

    The convolutions are 174 million multiplications and additions a particle.
    """
    layers = _layers(_decoder("gated-conv"))
    convolutions = [layer for layer in layers if len(layer) == 4]
    work = sum(784 * i * o * k * k for i, o, k, _ in convolutions)  # pyright: ignore[reportOperatorIssue]

    assert layers == [
        (40, 2 * 300),
        (300, 2 * 784),
        (1, 2 * 64, 3, 1),
        *[(64, 2 * 64, 3, 1)] * 3,
        (64, 1, 1, 1),
    ]
    assert round(work / 1e6) == 174


@pytest.mark.parametrize("gain", [0.0, 1.0, 1e6])
def test_the_gated_encoders_variance_is_kept_within_bounds(gain: float):
    """The log-variance lies in [−6, 2] whatever the image, and can be anywhere there."""
    images = gain * Noise(1).normal(50, 1, 28, 28, like=LIKE)
    mean, log_std = _encoder("gated-conv")(images)

    assert mean.isfinite().all()
    assert -3 <= log_std.min() <= log_std.max() <= 1
    if gain == 1e6:
        assert (log_std.min(), log_std.max()) == (-3, 1)
    if gain == 1.0:
        assert log_std.unique().numel() > 1000


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d], ids=["dense", "convolution"])
def test_a_gate_opens_and_shuts(layer: type[nn.Module]):
    """The result is h·σ(g), of which the first half of the layer's features is h."""
    weight, inputs = Noise(1).normal(6, 4, like=LIKE), Noise(2).normal(5, 4, like=LIKE)
    gated = layer(4, 6, bias=False) if layer is nn.Linear else layer(4, 6, 1, bias=False)
    h, g = (inputs @ weight.T).chunk(2, -1)
    with torch.no_grad():
        (only,) = gated.parameters()
        only.copy_(weight.view_as(only))
    if layer is nn.Conv2d:
        found = Gated(gated)(inputs.T.reshape(1, 4, 5, 1))[0, :, :, 0].T
    else:
        found = Gated(gated)(inputs)

    torch.testing.assert_close(found, h * g.sigmoid())


NETWORKS = {
    **{f"{name} encoder": (_encoder, name) for name in ENCODERS},
    **{f"{name} decoder": (_decoder, name) for name in DECODERS},
}


@pytest.mark.parametrize(("make", "name"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_is_rebuilt_from_its_generator(make, name: str):  # pyright: ignore[reportMissingParameterType]
    """The same generator gives the same weights, another seed others, and biases begin at zero."""
    one, same, other = (
        dict(make(name, (3, 5, 7), seed=seed).named_parameters()) for seed in (0, 0, 1)
    )

    assert len(one) >= 2
    for key, weight in one.items():
        assert torch.equal(weight, same[key])
        assert (weight == 0).all() if key.endswith("bias") else not torch.equal(weight, other[key])


@pytest.mark.parametrize("upper", [0, 3])
@pytest.mark.parametrize("name", ENCODERS)
def test_building_a_model_leaves_the_global_generator_alone(name: str, upper: int):
    """Fresh weights come of the generator that was given, and of it alone."""
    before = torch.get_rng_state()
    Architecture(encoder=name, decoder=name, upper=upper).build(Noise(0))

    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_gated_networks_keep_the_scale_of_what_they_see():
    """Neither planes nor logits of a fresh network vanish or explode."""
    images = (Noise(1).uniform(20, 1, 28, 28, like=LIKE) < 0.3).float()
    mean, _ = _encoder("gated-conv")(images)
    logits = _decoder("gated-conv")(Noise(2).normal(20, 40, like=LIKE))

    assert 1e-3 < mean.std() < 3
    assert 1e-3 < logits.std() < 3


CLIMBED: dict[str, Objective] = {
    "iwae": OBJECTIVES["iwae"],
    "miss-iwem": replace(OBJECTIVES["miss-iwem"], imputations=2),
    "whole": replace(OBJECTIVES["miss-iwem"], way_back=1.0),
}


@pytest.mark.parametrize("objective", CLIMBED.values(), ids=CLIMBED.keys())
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 5, 7)], ids=str)
def test_gated_convolutions_are_climbed(shape: ImageShape, objective: Objective):
    """Every weight of a model of gated convolutions has a finite gradient that is not zero."""
    architecture = Architecture(
        image_shape=shape, latent=3, hidden=(8,), encoder="gated-conv", decoder="gated-conv"
    )
    model = architecture.build(Noise(0))
    values = (Noise(1).uniform(4, *shape, like=LIKE) < 0.4).float()
    images = Incomplete.hide(values, Noise(2).uniform(4, *shape, like=LIKE) < 0.6)
    climbed = ascend(objective, model, images, Noise(3), particles=5)

    assert isinstance(model.encoder, GatedConvEncoder)
    assert isinstance(model.decoder, GatedConvDecoder)
    assert climbed.bound.isfinite()
    for parameter in model.parameters():
        assert isinstance(parameter.grad, Tensor)
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
