"""The objectives' gradients against plain autograd, closed forms and quadrature."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from model.latent import Architecture, LatentVariableModel, Particles
from model.masks import Incomplete
from model.noise import Noise, Source
from model.objectives import (
    OBJECTIVES,
    P_STEPS,
    Climbed,
    Objective,
    ascend,
    bound,
    doubly_reparameterised,
    elbo,
    elbo_analytic,
    expected_log_joint,
    iwae,
    optimal,
    wake,
)
from model.proposal import GaussianMixture
from model.refinement import Refinement
from tests.conftest import (
    Quadrature,
    copies,
    fixed_model,
    small_model,
    some_incomplete,
    standard_errors,
)

assert_agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
NOISE = Noise(5)

ROWS = {
    f"{name}/{p_step}": replace(objective, p_step=p_step)
    for name, objective in OBJECTIVES.items()
    for p_step in (P_STEPS if objective.steps else ["slides"])
}


LAYERS = {f"{name}, one layer": (row, 0) for name, row in ROWS.items()} | {
    f"{name}, two layers": (row, 3) for name, row in ROWS.items() if name != "vae-analytic/slides"
}

Gradients = dict[str, Tensor]


def _climbed(objective: Objective, *, alpha: float = 1.0, upper: int = 0) -> Gradients:
    """The gradients that `ascend` leaves behind, up the objective."""
    model = small_model(upper=upper)
    ascend(whole(objective), model, some_incomplete(), NOISE, particles=7, alpha=alpha)
    return _left(model)


def whole(objective: Objective, **options: object) -> Objective:
    """The objective with every particle on the way back."""
    return replace(objective, way_back=1.0, **options)  # pyright: ignore[reportArgumentType]


def _left(model: LatentVariableModel) -> Gradients:
    return {
        name: torch.zeros_like(p) if p.grad is None else -p.grad
        for name, p in model.named_parameters()
    }


def _particles(model: LatentVariableModel, objective: Objective) -> Particles:
    """The same particles as `ascend` draws, with z attached to θ and φ alike."""
    images = some_incomplete()
    proposal = objective.proposal(model, images, NOISE.at("proposal"))
    latents = proposal.draw(7, NOISE.at("particles"))
    found = model.particles(images, proposal, latents)
    _, missing = model.likelihood.log_densities(model.decode(latents), images)
    return replace(found, expected_log_missing=missing)


def _gradients(
    scalar: Tensor, model: LatentVariableModel, network: str | tuple[str, ...]
) -> Gradients:
    part = {n: p for n, p in model.named_parameters() if n.startswith(network)}
    found = torch.autograd.grad(
        scalar, list(part.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(part, found, strict=True))


def _of(network: str, gradients: Gradients) -> Gradients:
    return {n: g for n, g in gradients.items() if n.startswith(network)}


@pytest.mark.parametrize("two_pass", [False, True])
def test_decoder_gradient_of_iwae_is_that_of_q_hat(two_pass: bool):  # noqa: FBT001
    """Proposition 1: ∇θ IWAE = ∇θ Q̂ at the parameters that made the weights."""
    model = small_model()
    particles = _particles(model, Objective(bound=iwae, two_pass=two_pass))

    of_iwae = _gradients(iwae(particles).mean(), model, "decoder")
    of_q_hat = _gradients(expected_log_joint(particles).mean(), model, "decoder")

    assert all(g.abs().max() > 1e-3 for g in of_iwae.values())
    assert_agree(of_q_hat, of_iwae)


@pytest.mark.parametrize(("em", "direct"), [("iwem-woa", "iwae"), ("iwem", "iwae")])
def test_the_m_step_climbs_the_likelihood_as_iwae_does(em: str, direct: str):
    """Proposition 1, for the gradients that training uses."""
    by_em, by_iwae = _climbed(OBJECTIVES[em]), _climbed(OBJECTIVES[direct])

    assert_agree(_of("decoder", by_em), _of("decoder", by_iwae))


@pytest.mark.parametrize("imputations", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("objective", "upper"), LAYERS.values(), ids=LAYERS.keys())
def test_one_pass_back_gives_the_gradients_of_two(
    objective: Objective, alpha: float, imputations: int, upper: int
):
    """What `ascend` adds is ∇θ of the one surrogate and ∇φ of the other, by plain autograd."""
    objective = replace(objective, imputations=imputations)
    model = small_model(upper=upper)
    surrogate = objective.surrogate(_particles(model, objective), alpha=alpha)
    plain = _gradients(surrogate.decoder, model, ("decoder", "prior"))
    plain |= _gradients(surrogate.encoder, model, ("encoder", "upper_encoder"))

    climbed = _climbed(objective, alpha=alpha, upper=upper)

    assert all(g.abs().max() > 1e-5 for g in climbed.values())
    assert_agree(dict(sorted(climbed.items())), dict(sorted(plain.items())))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_ascend_returns_the_bound_and_adds_to_the_gradients(objective: Objective):
    """The returned number is the bound of the very particles that made the gradients."""
    model = small_model()
    expected = objective.bound(_particles(model, objective)).mean()

    bounds = [
        ascend(whole(objective), model, some_incomplete(), NOISE, particles=7, alpha=0.3).bound
        for _ in range(2)
    ]
    twice = {n: -p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}

    assert_agree(bounds, [expected.detach()] * 2)
    assert_agree(twice, _climbed(objective, alpha=0.3))
    assert not bounds[0].requires_grad


@pytest.mark.parametrize("p_step", P_STEPS)
def test_the_p_step_leaves_the_decoder_alone(p_step: str):
    """θ moves alike whatever φ climbs."""
    this = _climbed(replace(OBJECTIVES["miss-iwem"], p_step=p_step), alpha=0.3)
    slides = _climbed(OBJECTIVES["miss-iwem"], alpha=0.3)

    assert_agree(_of("decoder", this), _of("decoder", slides))


@pytest.mark.parametrize("p_step", P_STEPS)
def test_the_m_step_leaves_the_encoder_alone(p_step: str):
    """φ moves alike whatever the annealing of θ's objective."""
    objective = replace(OBJECTIVES["miss-iwem"], p_step=p_step)
    half, whole = _climbed(objective, alpha=0.3), _climbed(objective, alpha=1.0)

    assert_agree(_of("encoder", half), _of("encoder", whole))
    assert (half["decoder.layers.2.bias"] - whole["decoder.layers.2.bias"]).abs().max() > 1e-3


def test_annealing_goes_from_the_elbo_to_q_hat():
    """The M-step's gradient is linear in α between the VAE's and IWAE's."""
    start, half, end = (_climbed(OBJECTIVES["iwem"], alpha=a) for a in (0.0, 0.5, 1.0))
    vae = _climbed(OBJECTIVES["vae"])

    assert_agree(_of("decoder", start), _of("decoder", vae))
    between = {n: (start[n] + end[n]) / 2 for n in start}
    assert_agree(_of("decoder", half), _of("decoder", between))


@pytest.mark.parametrize("objective", ["miss-iwem-woa", "iwem-woa"])
def test_the_slides_p_step_is_the_gradient_through_log_abs_log_p(objective: str):
    """∇φ L̂_opt, written out with torch's distributions and θ held fixed, is what φ climbs."""
    model = small_model()
    images = some_incomplete()
    drawn = _particles(model, OBJECTIVES[objective])
    assert isinstance(drawn.proposal, GaussianMixture)
    z, seen = drawn.latents, images.observed[:, None].double()
    pixels = Bernoulli(logits=model.decoder(z))
    log_seen = (seen * pixels.log_prob(images.values[:, None])).sum((2, 3, 4))
    missing = ((1 - seen) * -pixels.entropy()).sum((2, 3, 4)).detach()
    log_p = log_seen + Normal(0, 1).log_prob(z).sum(-1)
    q = Normal(drawn.proposal.mean, drawn.proposal.log_std.exp())
    log_w = log_p - q.log_prob(z).sum(-1)
    mean = ((log_p + missing).abs() * log_w.exp()).mean(-1)

    direct = _gradients(mean.log().mean(), model, "encoder")

    climbed = _climbed(OBJECTIVES[objective])
    assert_agree(_of("encoder", climbed), direct)
    assert_agree(optimal(drawn), mean.log())


@pytest.mark.parametrize("objective", ROWS.values(), ids=ROWS.keys())
def test_a_pixel_that_nobody_saw_teaches_the_decoder_nothing(objective: Objective):
    """The missing part stands inside |log p| as a constant: no gradient reaches its pixels."""
    model = small_model()
    images = some_incomplete()
    images.observed[..., 0, 0] = False
    ascend(
        whole(objective),
        model,
        Incomplete.hide(images.values, images.observed),
        NOISE,
        particles=7,
    )
    gradient = model.get_parameter("decoder.layers.2.bias").grad

    assert gradient is not None
    assert gradient[0] == 0
    assert gradient[1:].abs().min() > 0


def _free(count: int, particles: int, *, components: int = 1) -> tuple[Particles, list[Tensor]]:
    """Particles of one image, many times over, each time with a proposal of its own."""
    model, noise = fixed_model(), Noise(11)
    images = copies(some_incomplete(1), count)
    place = torch.linspace(-0.6, 0.7, components * 2, dtype=torch.float64)
    mean = place.reshape(1, components, 2).repeat(count, 1, 1).requires_grad_()
    log_std = (mean.detach() * 0.2).requires_grad_()
    proposal = GaussianMixture(mean, log_std)
    return model.particles(images, proposal, proposal.draw(particles, noise)), [mean, log_std]


@pytest.mark.parametrize(("components", "count"), [(1, 4), (2, 1)])
def test_dreg_has_the_mean_gradient_of_iwae(components: int, count: int):
    """Of independent particles it has IWAE's expected φ-gradient, with less variance."""
    particles, leaves = _free(20_000, count, components=components)

    by_dreg = torch.autograd.grad(
        doubly_reparameterised(particles).sum(), leaves, retain_graph=True
    )
    by_iwae = torch.autograd.grad(iwae(particles).sum(), leaves)

    for dreg, whole in zip(by_dreg, by_iwae, strict=True):
        assert standard_errors(whole, 0.0).abs().max() > 5
        assert standard_errors(dreg - whole, 0.0).abs().max() < 4.5
    assert by_dreg[0].var(0).sum() < by_iwae[0].var(0).sum()


@pytest.mark.parametrize("components", [1, 2])
def test_wake_climbs_the_forward_divergence(components: int):
    """The wake P-step is −∇φ KL(p(z | x_o) ‖ q): its mean is E_p[∇φ log q(z)] by quadrature."""
    particles, leaves = _free(200, 2000, components=components)
    rule = Quadrature.of(fixed_model())
    log_q = particles.proposal.log_density(rule.latents[None].expand(200, -1, -1))
    posterior = rule.posterior(some_incomplete(1))

    exact = torch.autograd.grad((posterior * log_q).sum(), leaves)
    found = torch.autograd.grad(wake(particles).sum(), leaves)

    for gradient, expected in zip(found, exact, strict=True):
        assert expected.abs().max() > 0.1
        assert standard_errors(gradient, expected[0]).abs().max() < 4.5


def test_both_forms_of_the_elbo_have_one_expectation():
    """Replacing the sampled log-ratio by the closed-form divergence changes no mean."""
    particles, leaves = _free(20_000, 1)
    difference = (elbo(particles) - elbo_analytic(particles)).detach()
    gradients = torch.autograd.grad((elbo(particles) - elbo_analytic(particles)).sum(), leaves)

    assert standard_errors(difference, 0.0).abs() < 4
    for gradient in gradients:
        assert standard_errors(gradient, 0.0).abs().max() < 4.5


def test_the_analytic_elbo_refuses_a_mixture():
    """A mixture has no divergence in closed form, and the objective says so."""
    particles, _ = _free(1, 2, components=3)

    with pytest.raises(ValueError, match=r"one Gaussian .* got a mixture of 3"):
        elbo_analytic(particles)


def test_with_one_particle_every_bound_is_the_elbo():
    """At K = 1 IWAE and the ELBO are the same number."""
    particles, _ = _free(50, 1)

    assert_agree(iwae(particles), elbo(particles))


def test_on_complete_images_the_two_passes_are_one():
    """With nothing missing miss-IWEM is IWEM, to the bit."""
    images = Incomplete.complete(some_incomplete().values)
    gradients: list[list[Tensor | None]] = []
    for name in ("iwem", "miss-iwem"):
        model = small_model()
        ascend(whole(OBJECTIVES[name]), model, images, NOISE, particles=7, alpha=0.3)
        gradients.append([p.grad for p in model.parameters()])

    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


# What is thinned, drawn afresh, sampled or refined.


@dataclass(frozen=True)
class Split:
    """A source whose numbers for one purpose are those of another source."""

    source: Source
    purpose: str
    other: Source

    def at(self, *path: int | str) -> Source:
        """The other source for that purpose, and else a part of the first."""
        if path == (self.purpose,):
            return self.other
        return Split(self.source.at(*path), self.purpose, self.other)

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """The first source's."""
        return self.source.normal(*shape, like=like)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """The first source's."""
        return self.source.uniform(*shape, like=like)


THETA = ("decoder.", "prior.")
PHI = ("encoder.", "upper_encoder.")


def _ascended(
    objective: Objective,
    *,
    noise: Source = NOISE,
    climb: str = "both",
    upper: int = 0,
    images: Incomplete | None = None,
) -> tuple[Gradients, Climbed]:
    """The gradients of those parameters that `ascend` gives one, and what it returns."""
    model, images = small_model(upper=upper), images or some_incomplete()
    climbed = ascend(objective, model, images, noise, particles=7, alpha=0.3, climb=climb)
    found = {n: p.grad.neg() for n, p in model.named_parameters() if p.grad is not None}
    return found, climbed


def _flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


MISS = OBJECTIVES["miss-iwem"]
THINNED = {
    "vae": (OBJECTIVES["vae"], "both", 0),
    "vae-analytic": (OBJECTIVES["vae-analytic"], "both", 0),
    "iwae": (OBJECTIVES["iwae"], "both", 0),
    "slides": (replace(MISS, imputations=3), "both", 0),
    "iwae as P-step": (replace(MISS, p_step="iwae"), "both", 0),
    "dreg": (replace(MISS, p_step="dreg"), "both", 0),
    "wake": (replace(MISS, p_step="wake"), "both", 0),
    "two layers": (MISS, "both", 3),
    "decoder alone": (MISS, "decoder", 0),
    "slides, encoder alone": (MISS, "encoder", 0),
    "dreg, encoder alone": (replace(MISS, p_step="dreg"), "encoder", 0),
    "wake, encoder alone": (replace(MISS, p_step="wake"), "encoder", 0),
}


@pytest.mark.parametrize(("objective", "climb", "upper"), THINNED.values(), ids=THINNED.keys())
def test_fewer_particles_on_the_way_back_change_no_mean(
    objective: Objective, climb: str, upper: int
):
    """Over which particles go back the gradients' mean is that of all; the numbers are as ever."""
    exact, all_back = _ascended(whole(objective), climb=climb, upper=upper)
    images, sample = some_incomplete(), list[Tensor]()
    for seed in range(32):
        noise = Split(NOISE, "way back", Noise(seed))
        gradients, climbed = _ascended(
            objective, noise=noise, climb=climb, upper=upper, images=images
        )
        assert gradients.keys() == exact.keys()
        assert climbed == all_back
        sample.append(_flat(gradients))
    thinned, expected = torch.stack(sample), _flat(exact)
    random = thinned.std(0) > 1e-9

    assert random.any() or (objective.p_step, climb) == ("wake", "encoder")
    assert_agree(thinned[0, ~random], expected[~random])
    assert (standard_errors(thinned, expected).abs() < 4.5)[random].all()


@pytest.mark.parametrize("name", ["vae", "miss-iwem"])
def test_fewer_particles_on_the_way_back_are_of_use(name: str):
    """The gradient of a share of the particles is close to that of all, the larger the closer."""
    exact = _flat(_ascended(whole(OBJECTIVES[name]))[0])

    def error(share: float) -> float:
        objective = replace(OBJECTIVES[name], way_back=share)
        noises = [Split(NOISE, "way back", Noise(seed)) for seed in range(8)]
        found = [_flat(_ascended(objective, noise=noise)[0]) for noise in noises]
        return (torch.stack(found) - exact).square().mean().item()

    assert error(0.6) < 0.5 * error(0.15)
    assert error(0.6) < 0.2 * exact.square().mean()


def test_the_shared_particles_are_climbed_once_and_fresh_ones_twice():
    """θ and φ step together, or one after the other where the P-step has its own particles."""
    stopped, through = (Refinement(steps=2, through=t) for t in (False, True))

    assert MISS.climbs == ("both",)
    assert replace(MISS, svi=through).climbs == ("both",)
    assert replace(MISS, p_samples="fresh").climbs == ("decoder", "encoder")
    assert replace(MISS, svi=stopped).climbs == ("decoder", "encoder")


@pytest.mark.parametrize("upper", [0, 3])
@pytest.mark.parametrize("p_step", P_STEPS)
@pytest.mark.parametrize(("climb", "parts"), [("decoder", THETA), ("encoder", PHI)])
def test_each_climb_is_its_half_of_both(
    climb: str, parts: tuple[str, ...], p_step: str, upper: int
):
    """The decoder's climb leaves the encoder no gradient, and the reverse; its own is the same."""
    objective = whole(replace(MISS, p_step=p_step, imputations=2))
    both, _ = _ascended(objective, upper=upper)
    alone, _ = _ascended(objective, climb=climb, upper=upper)

    assert alone.keys() == {name for name in both if name.startswith(parts)}
    assert all(gradient.abs().max() > 1e-5 for gradient in alone.values())
    assert_agree(alone, {name: both[name] for name in alone})


def test_dreg_has_the_mean_gradient_of_iwae_with_two_layers():
    """The networks of the upper layer too are held constant in the proposal, not in the draws."""
    images, pairs = copies(some_incomplete(1), 60), list[Tensor]()
    for seed in range(30):
        by_each = [
            _ascended(
                whole(replace(MISS, p_step=p_step)),
                noise=Noise(seed),
                climb="encoder",
                upper=3,
                images=images,
            )[0]
            for p_step in ("dreg", "iwae")
        ]
        pairs.append(torch.stack([_flat(gradients) for gradients in by_each]))
    by_dreg, by_iwae = torch.stack(pairs, 1)
    moved = by_iwae.std(0) > 0  # a pixel that is zero moves no weight

    assert standard_errors(by_iwae, 0.0)[moved].abs().max() > 5
    assert standard_errors(by_dreg - by_iwae, 0.0)[moved].abs().max() < 4.5
    assert_agree(by_dreg[:, ~moved], by_iwae[:, ~moved])
    assert by_dreg.var(0).sum() < by_iwae.var(0).sum()


SAMPLED = {
    "miss-iwem": MISS,
    "miss-iwem-woa, two imputations": replace(OBJECTIVES["miss-iwem-woa"], imputations=2),
}


@pytest.mark.parametrize("objective", SAMPLED.values(), ids=SAMPLED.keys())
def test_sampled_pixels_change_no_mean(objective: Objective):
    """Keeping log p(x_m | z) of a draw adds only variance to θ's gradient, and nothing to φ's.

    Its mean is zero whatever the particles, so that it does not covary with what they give.
    """
    marginal, _ = _ascended(objective)
    images, sample = some_incomplete(), list[Tensor]()
    for seed in range(48):
        noise = Split(NOISE, "missing", Noise(seed))
        sampled, _ = _ascended(replace(objective, m_step="sampled"), noise=noise, images=images)
        assert_agree(_of("encoder", sampled), _of("encoder", marginal))
        sample.append(_flat(_of("decoder", sampled)))
    drawn = torch.stack(sample)

    assert drawn.std(0).min() > 1e-5
    assert standard_errors(drawn, _flat(_of("decoder", marginal))).abs().max() < 4.5


@pytest.mark.parametrize(("name", "share"), [("miss-iwem", 0.3), ("miss-iwem-woa", 1.0)])
def test_the_sampled_pixels_term_is_weighted_as_q_hat(name: str, share: float):
    """What is added is ∇θ of α Σ w̃ log p(x_m | z) with x_m ~ p(x_m | z), by torch's Bernoulli."""
    objective, images, model = whole(OBJECTIVES[name]), some_incomplete(), small_model()
    drawn = _particles(model, objective)
    pixels = Bernoulli(logits=model.decoder(drawn.latents.detach()))
    uniforms = NOISE.at("missing").uniform(42, 1, 1, 3, 3, like=pixels.probs).view(6, 7, 1, 3, 3)
    log_p = pixels.log_prob((uniforms < pixels.probs).double()) * ~images.observed[:, None]
    w = drawn.log_weights.detach().softmax(-1)
    direct = _gradients(share * (w * log_p.sum((2, 3, 4))).sum(-1).mean(), model, "decoder")

    sampled, _ = _ascended(replace(objective, m_step="sampled"))
    marginal, _ = _ascended(objective)

    added = {n: sampled[n] - marginal[n] for n in direct}
    assert all(gradient.abs().max() > 1e-3 for gradient in added.values())
    assert_agree(added, direct)


def test_with_nothing_missing_there_is_nothing_to_sample():
    """Of complete images both M-steps are one."""
    images = Incomplete.complete(some_incomplete().values)
    marginal, _ = _ascended(MISS, images=images)
    sampled, _ = _ascended(replace(MISS, m_step="sampled"), images=images)

    assert_agree(sampled, marginal)


REFINED = {
    "miss-iwem, one layer": (MISS, 0),
    "miss-iwem, three imputations": (replace(MISS, imputations=3), 0),
    "miss-iwem, two layers": (MISS, 3),
    "iwae, one layer": (OBJECTIVES["iwae"], 0),
    "iwae, two layers": (OBJECTIVES["iwae"], 3),
    "wake, one layer": (replace(MISS, p_step="wake"), 0),
}


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize(("objective", "upper"), REFINED.values(), ids=REFINED.keys())
def test_refined_proposals_are_climbed(objective: Objective, upper: int, through: bool):  # noqa: FBT001
    """With refinement, stopped or through, the steps of the optimiser move all of θ and φ."""
    objective = replace(objective, svi=Refinement(steps=2, through=through))
    moved: Gradients = {}
    for climb in objective.climbs:
        moved |= _ascended(objective, climb=climb, upper=upper)[0]

    assert moved.keys() == {name for name, _ in small_model(upper=upper).named_parameters()}
    assert all(g.isfinite().all() and g.abs().max() > 1e-6 for g in moved.values())


@pytest.mark.parametrize(("objective", "upper"), REFINED.values(), ids=REFINED.keys())
def test_the_decoder_takes_refined_particles_as_they_are(objective: Objective, upper: int):
    """θ's gradient is that of log p(x, z_k), with z_k constant, stopped or through."""
    gradients = [
        _ascended(
            whole(objective, svi=Refinement(steps=2, through=through)),
            climb="decoder",
            upper=upper,
        )[0]
        for through in (False, True)
    ]
    plain, _ = _ascended(whole(objective), climb="decoder", upper=upper)

    assert (_flat(plain) - _flat(gradients[0])).abs().max() > 1e-3
    assert_agree(gradients[1], gradients[0])


@pytest.mark.parametrize(("objective", "upper"), REFINED.values(), ids=REFINED.keys())
def test_the_encoder_learns_through_the_refinement(objective: Objective, upper: int):
    """φ's gradient through the steps is that of the surrogate by plain autograd."""
    objective = whole(objective, svi=Refinement(steps=2, through=True))
    model = small_model(upper=upper)
    surrogate = objective.surrogate(_particles(model, objective), alpha=0.3)
    plain = _gradients(surrogate.encoder, model, PHI)

    assert_agree(
        {n: g for n, g in _ascended(objective, upper=upper)[0].items() if n in plain}, plain
    )


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize(("objective", "upper"), REFINED.values(), ids=REFINED.keys())
def test_refined_proposals_are_validated(objective: Objective, upper: int, through: bool):  # noqa: FBT001
    """Validation refines as a step does, and its bound carries no gradient."""
    objective = replace(objective, svi=Refinement(steps=2, through=through))
    model = small_model(upper=upper)
    found = bound(objective, model, some_incomplete(), NOISE, particles=7)

    assert_agree(found, objective.bound(_particles(model, objective)).detach())
    assert not found.requires_grad


@pytest.mark.parametrize(("objective", "upper"), REFINED.values(), ids=REFINED.keys())
def test_the_encoder_learns_where_a_stopped_refinement_begins(objective: Objective, upper: int):
    """Where the steps are held constant φ climbs as if there were none."""
    stopped = whole(objective, svi=Refinement(steps=2, through=False))
    refined, _ = _ascended(stopped, climb="encoder", upper=upper)
    plain, _ = _ascended(whole(objective), climb="encoder", upper=upper)

    assert_agree(refined, plain)


@pytest.mark.parametrize("objective", ROWS.values(), ids=ROWS.keys())
def test_a_step_knows_the_variance_of_its_estimates(objective: Objective):
    """That of the ELBO is Var(log w)/K; that of Q̂ is Σ w̃² (log p − Q̂)², image by image."""
    drawn = _particles(small_model(), objective)
    _, climbed = _ascended(objective)
    of_elbo, of_q_hat = 0.0, 0.0
    for log_w, log_p in zip(drawn.log_weights.tolist(), drawn.log_joint.tolist(), strict=True):
        mean = sum(log_w) / 7
        of_elbo += sum((v - mean) ** 2 for v in log_w) / 7 / 7 / 6
        w = [math.exp(v) / sum(map(math.exp, log_w)) for v in log_w]
        q_hat = sum(a * b for a, b in zip(w, log_p, strict=True))
        of_q_hat += sum((a * (b - q_hat)) ** 2 for a, b in zip(w, log_p, strict=True)) / 6

    assert climbed.elbo_variance.item() == pytest.approx(of_elbo, rel=1e-10)
    assert climbed.q_hat_variance.item() == pytest.approx(of_q_hat, rel=1e-10)


NETWORKS = {
    "mlp": Architecture(hidden=(16,), latent=4),
    "mlp, two layers": Architecture(hidden=(16,), latent=4, upper=3, upper_hidden=(6,)),
    "linear": Architecture(decoder="linear", hidden=(16,), latent=4),
    "gated-conv": Architecture(encoder="gated-conv", decoder="gated-conv", hidden=(16,), latent=4),
}


@pytest.mark.parametrize("p_step", P_STEPS)
@pytest.mark.parametrize("architecture", NETWORKS.values(), ids=NETWORKS.keys())
def test_products_in_bf16_climb_as_those_in_fp32(architecture: Architecture, p_step: str):
    """Rounded networks leave gradients in fp32 that point where the exact ones do."""
    objective = whole(OBJECTIVES["iwem-woa"], p_step=p_step)
    values = Noise(1).uniform(4, 1, 28, 28, like=torch.empty(0)).round()
    images = Incomplete.hide(values, values.roll(5, -1) < 0.5)
    exact, rounded = architecture.build(Noise(0)), architecture.build(Noise(0))
    expected = ascend(objective, exact, images, NOISE, particles=5)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        climbed = ascend(objective, rounded, images, NOISE, particles=5)

    torch.testing.assert_close(climbed.bound, expected.bound, rtol=0.005, atol=0)
    assert climbed.bound.dtype == torch.float32
    assert climbed.bound != expected.bound
    found, true = (torch.cat([g.flatten() for g in _left(m).values()]) for m in (rounded, exact))
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, true, dim=0) > 0.99
