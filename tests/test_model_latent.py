"""Proposals, likelihood and the model against torch's distributions and quadrature."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, distributions, nn
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

from model.latent import Architecture, LatentVariableModel
from model.masks import Incomplete
from model.networks import Gaussian
from model.noise import Noise, Source
from model.pixels import Bernoulli
from model.proposal import (
    Amortised,
    GaussianMixture,
    Proposal,
    Stacked,
    StackedPrior,
    StandardNormal,
)
from tests.conftest import (
    Quadrature,
    copies,
    every_image,
    fixed_model,
    small_model,
    some_incomplete,
    standard_errors,
)

assert_agree = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
LIKE = torch.zeros((), dtype=torch.float64)


def _mixture(components: int, *, batch: int = 1, latent: int = 2) -> GaussianMixture:
    """A mixture whose components differ in place and width."""
    shape = (1, components, latent)
    mean = 1.5 * Noise(1).normal(*shape, like=LIKE)
    log_std = 0.4 * Noise(2).normal(*shape, like=LIKE)
    return GaussianMixture(mean.repeat(batch, 1, 1), log_std.repeat(batch, 1, 1))


def _torch(mixture: GaussianMixture) -> MixtureSameFamily:
    return MixtureSameFamily(
        distributions.Categorical(logits=torch.zeros(mixture.mean.shape[:2], dtype=torch.float64)),
        Independent(Normal(mixture.mean, mixture.log_std.exp()), 1),
    )


@pytest.mark.parametrize("components", [1, 2, 7])
def test_the_mixtures_density_is_that_of_torch(components: int):
    """Its log_density is MixtureSameFamily's."""
    mixture = _mixture(components, batch=3, latent=4)
    z = 2 * Noise(3).normal(3, 5, 4, like=LIKE)

    expected = _torch(mixture).log_prob(z.transpose(0, 1)).T
    assert_agree(mixture.log_density(z), expected)
    assert_agree(mixture.detach().log_density(z), expected)


def test_the_priors_density_is_that_of_torch():
    """The logarithm of p(z) is that of independent standard normals."""
    z = Noise(3).normal(3, 5, 4, like=LIKE)

    expected = Normal(0, 1).log_prob(z).sum(-1)
    assert_agree(StandardNormal(4).log_density(z), expected)


@pytest.mark.parametrize("components", [1, 3])
def test_the_density_integrates_to_one(components: int):
    """Over a grid of the line the density sums to one."""
    grid = torch.arange(-30, 30, 0.05, dtype=torch.float64)[None, :, None]
    density = _mixture(components, latent=1).log_density(grid).exp()

    assert abs(density.sum().item() * 0.05 - 1) < 1e-10


@pytest.mark.parametrize("particles", [6, 12, 14, 2])
def test_draws_use_the_components_evenly(particles: int):
    """No component is used twice before every other has been used."""
    far = GaussianMixture(
        1000.0 * torch.arange(6, dtype=torch.float64).reshape(1, 6, 1).repeat(50, 1, 1),
        torch.zeros(50, 6, 1, dtype=torch.float64),
    )
    used = (far.draw(particles, Noise(0))[..., 0] / 1000).round().long()
    counts = torch.nn.functional.one_hot(used, 6).sum(1)

    assert (counts.amax(1) - counts.amin(1) <= 1).all()
    assert (counts.sum(1) == particles).all()


@pytest.mark.parametrize("particles", [1, 4, 5])
def test_every_particle_is_by_itself_a_draw_from_the_mixture(particles: int):
    """In each position every component is as likely, and the latent has its component's spread."""
    far = GaussianMixture(
        100.0 * torch.arange(4, dtype=torch.float64).reshape(1, 4, 1).repeat(4000, 1, 1),
        torch.tensor([0.5, 1.0, 1.5, 2.0]).log().reshape(1, 4, 1).double().repeat(4000, 1, 1),
    )
    z = far.draw(particles, Noise(1))[..., 0]
    used = (z / 100).round().long()
    standard = (z - 100.0 * used) / (0.5 + 0.5 * used)

    for position in range(particles):
        assert chisquare(used[:, position].bincount(minlength=4)).pvalue > 1e-3
        assert standard_errors(standard[:, position], 0.0).abs() < 4
        assert standard_errors(standard[:, position].square(), 1.0).abs() < 4


@pytest.mark.parametrize("particles", [1, 3, 8])
@pytest.mark.parametrize("components", [1, 2, 5])
def test_the_balance_heuristic_is_unbiased(components: int, particles: int):
    """The mean of f(z) / q(z) is ∫ f, for any number of particles of any mixture."""
    wide = _mixture(components, batch=20_000)
    wide = GaussianMixture(wide.mean, wide.log_std.abs() + 0.2)
    z = wide.draw(particles, Noise(4))
    weights = (StandardNormal(2).log_density(z) - wide.log_density(z)).exp()

    assert standard_errors(weights.mean(-1), 1.0).abs() < 4
    assert standard_errors((weights[..., None] * z).mean(1), 0.0).abs().max() < 4


def test_the_analytic_divergence_is_that_of_torch():
    """KL(q ‖ p) is kl_divergence of normals."""
    mixture = _mixture(1, batch=3, latent=4)
    expected = kl_divergence(Normal(mixture.mean, mixture.log_std.exp()), Normal(0, 1))

    assert_agree(mixture.divergence(), expected.sum((1, 2)))


def test_a_mixture_has_no_analytic_divergence():
    """Asking for it names what was expected and what came."""
    with pytest.raises(ValueError, match=r"Expected a proposal of one Gaussian .* mixture of 2"):
        _mixture(2).divergence()


@pytest.mark.parametrize("components", [1, 3])
def test_draws_are_reparameterised(components: int):
    """∂z/∂μ is one and ∂z/∂log σ is z − μ for the component that drew each particle."""
    mixture = _mixture(components)
    mean, log_std = mixture.mean.requires_grad_(), mixture.log_std.requires_grad_()
    z = GaussianMixture(mean, log_std).draw(components, Noise(5))
    to_mean, to_log_std = torch.autograd.grad(z.sum(), [mean, log_std])

    assert_agree(to_mean, torch.ones_like(mean))
    assert_agree(to_log_std.sum(1), (z - mean).sum(1).detach())


def test_a_detached_proposal_carries_no_gradient():
    """Its density still depends on z, and on no parameter."""
    mixture = _mixture(2)
    mixture.mean.requires_grad_()

    assert not mixture.detach().log_density(torch.zeros(1, 1, 2).double()).requires_grad


@pytest.mark.parametrize("components", [1, 3])
def test_single_precision_is_enough_however_far_and_narrow(components: int):
    """In float32 the density of latents at 30 ± 0.01 is that of float64 to within 1e-4."""
    shape = (2, components, 40)
    mean = 30 + 0.01 * Noise(1).normal(*shape, like=LIKE.float())
    mean[1] = -mean[1]
    mixture = GaussianMixture(mean, math.log(0.01) + 0.1 * Noise(2).normal(*shape, like=mean))
    exact = GaussianMixture(mixture.mean.double(), mixture.log_std.double())
    z = mixture.draw(50, Noise(3))
    density = mixture.log_density(z)

    expected = _torch(exact).log_prob(z.double().transpose(0, 1)).T
    assert density.dtype == torch.float32
    torch.testing.assert_close(density.double(), expected, rtol=0, atol=1e-4)


# Two stochastic layers.


def _network(inputs: int, outputs: int, *, seed: int = 4) -> Gaussian:
    """A network whose mean and width depend on what it sees."""
    return Gaussian((inputs, 5, 2 * outputs), Noise(seed).generator()).double()


def _normal(network: Gaussian, seen: Tensor) -> Independent:
    mean, log_std = network(seen)
    return Independent(Normal(mean, log_std.exp()), 1)


def _wider(network: nn.Module, log_factor: float) -> nn.Module:
    """The network with larger standard deviations."""
    *_, bias = network.parameters()
    bias.data[len(bias) // 2 :] += log_factor
    return network


def _stacked(components: int, *, batch: int = 1) -> Stacked:
    """A proposal of two latents below three."""
    return Stacked(_mixture(components, batch=batch), _network(2, 3))


@pytest.mark.parametrize("components", [1, 3])
def test_the_density_of_two_layers_is_that_of_torch(components: int):
    """It is q(z₁)·q(z₂ | z₁), where the lower latents come first."""
    proposal = _stacked(components, batch=4)
    z = 2 * Noise(3).normal(4, 6, 5, like=LIKE)
    z1, z2 = z.split([2, 3], -1)

    lower = _torch(proposal.lower).log_prob(z1.transpose(0, 1)).T
    expected = lower + _normal(_network(2, 3), z1).log_prob(z2)
    assert_agree(proposal.log_density(z), expected)
    assert_agree(proposal.detach().log_density(z), expected)


def test_the_prior_of_two_layers_is_that_of_torch():
    """It is p(z₂)·p(z₁ | z₂) with a standard normal above."""
    prior, z = StackedPrior(2, 3, _network(3, 2)), 2 * Noise(3).normal(4, 6, 5, like=LIKE)
    z1, z2 = z.split([2, 3], -1)

    expected = Normal(0, 1).log_prob(z2).sum(-1) + _normal(_network(3, 2), z2).log_prob(z1)
    assert_agree(prior.log_density(z), expected)


@pytest.mark.parametrize("components", [1, 3])
def test_each_layer_is_drawn_given_the_other(components: int):
    """In its own layer's units what was drawn is N(0, I), whatever it was drawn given."""
    proposal, prior = _stacked(components), StackedPrior(2, 3, _network(3, 2))
    drawn = proposal.draw(20_000, Noise(6))[0]
    of_prior = prior.draw(20_000, Noise(6), like=LIKE)
    mean, log_std = _network(2, 3)(drawn[:, :2])
    prior_mean, prior_log_std = _network(3, 2)(of_prior[:, 2:])

    assert torch.equal(drawn[None, :, :2], proposal.lower.draw(20_000, Noise(6)))
    for units, given in (
        ((drawn[:, 2:] - mean) / log_std.exp(), drawn[:, :2]),
        ((of_prior[:, :2] - prior_mean) / prior_log_std.exp(), of_prior[:, 2:]),
        (of_prior[:, 2:], torch.ones(20_000, 1)),
    ):
        assert standard_errors(units, 0.0).abs().max() < 4
        assert standard_errors(units.square(), 1.0).abs().max() < 4
        assert standard_errors(units[:, :, None] * given[:, None], 0.0).abs().max() < 4.5


@pytest.mark.parametrize("components", [1, 3])
def test_weights_of_two_layers_are_unbiased(components: int):
    """With q wider than p in both layers the mean of p(z) / q(z) is one, and so of f(z)·p / q."""
    prior, mixture = StackedPrior(2, 3, _network(3, 2)), _mixture(components, batch=20_000)
    wider = GaussianMixture(0.3 * mixture.mean, mixture.log_std.abs() + 0.7)
    proposal = Stacked(wider, _wider(_network(2, 3), 0.7))
    z = proposal.draw(4, Noise(7))
    weights = (prior.log_density(z) - proposal.log_density(z)).exp()

    assert standard_errors(weights.mean(-1), 1.0).abs() < 4
    assert standard_errors((weights[..., None] * z[..., 2:]).mean(1), 0.0).abs().max() < 4
    assert standard_errors((weights[..., None] * z[..., 2:] ** 2).mean(1), 1.0).abs().max() < 4


def test_a_detached_proposal_of_two_layers_depends_on_the_latents_alone():
    """Its density has the same gradient in z as before, and none in any parameter."""
    mixture, network = _mixture(2), _network(2, 3)
    parameters = [mixture.mean.requires_grad_(), *network.parameters()]
    proposal = Stacked(mixture, network)
    z = Noise(3).normal(1, 6, 5, like=LIKE).requires_grad_()

    (expected,) = torch.autograd.grad(proposal.log_density(z).sum(), [z])
    constant = proposal.detach().log_density(z).sum()
    of_z, *of_parameters = torch.autograd.grad(constant, [z, *parameters], allow_unused=True)
    assert_agree(of_z, expected)
    assert of_z.abs().min() > 1e-3
    assert of_parameters == [None] * len(parameters)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not proposal.detach().log_density(z.detach()).requires_grad


def test_two_layers_have_no_analytic_divergence():
    """Asking for it names what was expected and what came."""
    with pytest.raises(ValueError, match=r"Expected a proposal of one .* two stochastic layers"):
        _stacked(1).divergence()


def _exact(model: LatentVariableModel, images: Incomplete) -> Tensor:
    """p(x_o) of a model of two layers with two latents below one, by the trapezium rule."""
    step = 0.4
    axis = torch.arange(-7.2, 7.2 + step, step, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis)
    mass = Normal(0, 1).log_prob(grid).sum(-1).exp() * step**3
    mean, log_std = model.get_submodule("prior.network")(grid[:, :1])
    logits = model.decoder(mean + log_std.exp() * grid[:, 1:])[:, None]
    by_pixel = distributions.Bernoulli(logits=logits).log_prob(images.values)
    return mass @ (by_pixel * images.observed).flatten(2).sum(-1).exp()


def test_a_model_of_two_layers_samples_its_own_distribution():
    """Images drawn from it have its probabilities p(x), by quadrature over both layers."""
    model = small_model(image_shape=(1, 2, 2), upper=1).requires_grad_(requires_grad=False)
    samples = model.sample(20_000, Noise(2))
    codes = (samples.flatten(1) @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long()
    p = _exact(model, Incomplete.complete(every_image(2, 2)))

    assert abs(p.sum().item() - 1) < 1e-9
    assert chisquare(codes.bincount(minlength=16), 20_000 * p / p.sum()).pvalue > 1e-3


@pytest.mark.parametrize("imputations", [1, 3])
def test_the_weights_of_a_model_of_two_layers_have_the_mean_of_the_likelihood(imputations: int):
    """E_q[p(x_o, z₁, z₂) / q(z₁, z₂)] = p(x_o) of any image, whatever the encoders say."""
    model = small_model(image_shape=(1, 2, 2), upper=1).requires_grad_(requires_grad=False)
    assert model.upper_encoder is not None
    _wider(model.upper_encoder, 1.5)
    seen = Noise(8).uniform(8, 1, 2, 2, like=LIKE) < 0.7
    images = Incomplete.hide(every_image(2, 2)[::2], seen)
    many = copies(images, 4000)
    proposal = model.two_pass(many, Noise(9), imputations=imputations)
    mixture = proposal.lower
    wider = proposal.above(GaussianMixture(0.5 * mixture.mean, mixture.log_std.clamp(min=1)))
    particles = model.particles(many, wider, wider.draw(5, Noise(10)))
    weights = particles.log_weights.exp().mean(-1).reshape(8, 4000).T

    assert standard_errors(weights, _exact(model, images)).abs().max() < 4.5


# The likelihood.


def _pixels(*, extreme: float = 1.0) -> tuple[Tensor, Incomplete]:
    images = some_incomplete(3)
    return 3 * extreme * Noise(6).normal(3, 4, 1, 3, 3, like=LIKE), images


@pytest.mark.parametrize("extreme", [1.0, 100.0])
def test_the_likelihood_is_that_of_torch(extreme: float):
    """The sums over observed and missing pixels are torch's log_prob and minus its entropy."""
    logits, images = _pixels(extreme=extreme)
    pixels, seen = distributions.Bernoulli(logits=logits), images.observed[:, None].double()
    density = Bernoulli().log_density(logits, images)
    without_gradient, expected = Bernoulli().log_densities(logits, images)

    by_torch = (seen * pixels.log_prob(images.values[:, None])).sum((2, 3, 4))
    assert_agree(density, by_torch)
    assert_agree(without_gradient, by_torch)
    if extreme == 1:
        entropy = ((1 - seen) * pixels.entropy()).sum((2, 3, 4))
        assert_agree(expected, -entropy)
    assert (expected <= 1e-9).all()


def test_the_likelihoods_gradient_is_that_of_finite_differences():
    """Its hand-written derivatives, the first and the second, pass gradcheck."""
    logits, images = _pixels()
    logits.requires_grad_()

    assert torch.autograd.gradcheck(lambda t: Bernoulli().log_density(t, images), logits)
    assert torch.autograd.gradgradcheck(lambda t: Bernoulli().log_density(t, images), logits)


def test_the_likelihood_ignores_what_a_hole_holds():
    """NaN under the mask reaches neither the value nor the gradient."""
    logits, images = _pixels()
    dirty = Incomplete.hide(
        torch.where(images.observed, images.values, torch.nan), images.observed
    )

    torch.testing.assert_close(
        Bernoulli().log_density(logits, dirty), Bernoulli().log_density(logits, images)
    )


def test_the_density_of_some_pixels_is_a_sum():
    """The seen pixels' log-probability and the unseen ones' add up to that of the image."""
    logits, images = _pixels()
    truth = some_incomplete(3, seed=9).values
    likelihood = Bernoulli()
    whole = likelihood.log_density(logits, Incomplete.complete(truth))
    parts = [
        likelihood.log_density_of(logits, truth, where)
        for where in (images.observed, ~images.observed)
    ]

    assert_agree(sum(parts), whole)


def test_samples_have_the_mean_and_mean_square_of_the_likelihood():
    """An x ~ p(x | z) is binary, with E[x | z] and E[x² | z] as they are said to be."""
    logits, _ = _pixels()
    likelihood, many = Bernoulli(), logits.repeat(1, 2000, 1, 1, 1)
    x = likelihood.sample(many, Noise(8).uniform(*many.shape, like=many))
    groups = x.reshape(3, 2000, 4, 1, 3, 3).transpose(0, 1)

    assert set(x.unique().tolist()) == {0.0, 1.0}
    for power, mean in ((1, likelihood.mean(logits)), (2, likelihood.mean_square(logits))):
        error = (mean * (1 - mean) / 2000).sqrt()
        assert ((groups**power).mean(0) - mean).abs().div(error).max() < 4.5


# The model.


def test_the_joint_density_sums_to_one():
    """Σ_x ∫ p(x, z) dz = 1 over all 512 images of nine pixels, and each p(x) is the oracle's."""
    model = fixed_model()
    images, step = Incomplete.complete(every_image()), 0.25
    rule = Quadrature.of(model, step=step)
    proposal = StandardProposal(2)
    total = torch.zeros(512, dtype=torch.float64)
    for part in rule.latents.split(2000):
        particles = model.particles(images, proposal, part[None].expand(512, -1, -1))
        total += particles.log_joint.exp().sum(-1) * step**2

    torch.testing.assert_close(total.log(), rule.log_likelihood(images), rtol=0, atol=1e-9)
    assert abs(total.sum().item() - 1) < 1e-10


class StandardProposal:
    """The prior as a proposal: another member of the family, by its protocol alone."""

    def __init__(self, latent: int) -> None:
        self.prior = StandardNormal(latent)

    def draw(self, particles: int, noise: Source) -> Tensor:
        """Latents of one image from the prior."""
        return noise.normal(1, particles, self.prior.latent, like=LIKE)

    def log_density(self, latents: Tensor) -> Tensor:
        """The prior's."""
        return self.prior.log_density(latents)

    def divergence(self) -> Tensor:
        """Zero."""
        return torch.zeros(1, dtype=torch.float64)

    def detach(self) -> Proposal:
        """Itself, since it has no parameters."""
        return self


def test_any_proposal_will_do():
    """The particles take whatever keeps the protocol; with the prior w is p(x_o | z)."""
    model, images, prior = fixed_model(), some_incomplete(1), StandardProposal(2)
    particles = model.particles(images, prior, prior.draw(20, Noise(0)))

    assert_agree(particles.log_weights, particles.log_likelihood)


def test_the_model_samples_its_own_distribution():
    """Images drawn from the model have its probabilities p(x), by quadrature."""
    model = fixed_model(image_shape=(1, 2, 2))
    samples = model.sample(20_000, Noise(2))
    codes = (samples.flatten(1) @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long()
    p = Quadrature.of(model).log_likelihood(Incomplete.complete(every_image(2, 2))).exp()

    assert chisquare(codes.bincount(minlength=16), 20_000 * p / p.sum()).pvalue > 1e-3


def test_imputing_keeps_what_was_seen():
    """Whatever the latents, observed pixels are the image's to the bit, the others binary."""
    model, images = fixed_model(), some_incomplete()
    z = Noise(0).normal(6, 5, 2, like=LIKE)
    filled = model.impute(images, z, Noise(1))

    seen = images.observed[:, None].expand_as(filled)
    assert torch.equal(filled[seen], images.values[:, None].expand_as(filled)[seen])
    assert set(filled[~seen].unique().tolist()) <= {0.0, 1.0}


TWO_PASS: dict[str, Callable[[Incomplete, Source], Amortised]] = {
    "two_pass": lambda images, noise: fixed_model().two_pass(images, noise, imputations=3),
    "adapted": lambda images, noise: fixed_model().adapted(images, noise, imputations=3),
}


@pytest.mark.parametrize("make", TWO_PASS.values(), ids=TWO_PASS.keys())
def test_with_nothing_missing_every_proposal_is_the_encoders(
    make: Callable[[Incomplete, Source], Amortised],
):
    """There is nothing to impute: each component is q(z | x)."""
    images = Incomplete.complete(some_incomplete().values)
    proposal, plain = make(images, Noise(0)), fixed_model().zero_filled(images)

    assert_agree(proposal.lower.mean, plain.lower.mean.expand(-1, 3, -1))
    assert_agree(proposal.lower.log_std, plain.lower.log_std.expand(-1, 3, -1))


def test_the_first_pass_fills_with_the_models_own_pixels():
    """The two-pass proposal is the encoder's at x̆, where x̆_m ~ p(x_m | z̆), z̆ ~ q(z | (x_o, 0))."""
    model, images, noise = fixed_model(), some_incomplete(), Noise(3)
    z = model.zero_filled(images).draw(4, noise.at("first"))
    fillings = model.impute(images, z, noise.at("filling"))

    two_pass = model.two_pass(images, noise, imputations=4)
    expected, _ = model.encoder(fillings)
    torch.testing.assert_close(two_pass.lower.mean, expected, rtol=0, atol=0)


def test_where_nothing_was_seen_the_adapted_proposal_is_the_prior():
    """A blank image is proposed from N(0, I); its neighbours are not."""
    images = some_incomplete(3)
    images.observed[1] = False
    adapted = fixed_model().adapted(
        Incomplete.hide(images.values, images.observed), Noise(0), imputations=5
    )

    assert (adapted.lower.mean[1] == 0).all()
    assert (adapted.lower.log_std[1] == 0).all()
    assert adapted.lower.mean[0].abs().min() > 0


def test_a_model_is_rebuilt_from_its_architecture_and_noise():
    """The same noise gives the same weights, another seed others, and biases begin at zero."""
    architecture = Architecture(image_shape=(1, 2, 3), latent=2, hidden=(5, 4))
    one, same, other = (dict(architecture.build(Noise(s)).named_parameters()) for s in (0, 0, 1))

    assert architecture.build(Noise(0)).device == torch.device("cpu")
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        if name.endswith("bias"):
            assert (weight == 0).all()
        else:
            assert not torch.equal(weight, other[name])


def test_weights_begin_with_xaviers_spread():
    """The standard deviation of a fresh layer is √(2 / (inputs + outputs))."""
    weights = Architecture().build(Noise(0)).get_parameter("decoder.layers.4.weight")
    expected = math.sqrt(2 / (300 + 784))

    assert abs(weights.std().item() / expected - 1) < 4 / math.sqrt(2 * weights.numel())
