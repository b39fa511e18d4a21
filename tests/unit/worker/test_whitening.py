import copy

import pytest
import torch

from d2lora.initializations import LoraSpec, Orpo, Sft, Whitening
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.support.reference import sft_loss, weight_gradients
from tests.unit.worker.conftest import one_fold, reference_rows
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes
from worker.moments import Moment
from worker.objectives import bases_of, objective_coefficients
from worker.statistics import gather
from worker.targets import lora_config, resolve_targets
from worker.whitening import MomentGradient, MomentSketch, whitened_factorization, whitened_gramian

CPU = torch.device("cpu")
WHITENING = Whitening(damping=0.1, power=0.5)
SFT = [Sft()]
SIDES = [(30, 50), (50, 30), (40, 40)]


def reconstruct(direction):
    return ((direction.left * direction.values) @ direction.right).double()


def power(matrix, exponent, shift):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.clamp(min=0) + shift) ** exponent) @ vectors.T


def dense_whitened(gradient, moment, whitening):
    shift = whitening.damping * moment.trace() / len(moment)
    return gradient @ power(moment, -whitening.power, shift)


def best(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def skewed_tokens(count, size, *, rank, seed, rest=0.1):
    """Tokens whose second moment has a few large eigenvalues, and otherwise equal small ones."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    isotropic = torch.linalg.qr(torch.randn(count, size, generator=generator, dtype=torch.float64)).Q * count**0.5
    return (isotropic @ power(large @ large.T, 0.5, rest)).float()


def random_layer(kind, sides, *, rank, seed=0, tokens=400, gradient_rank=None, width=8, rest=0.1):
    """Statistics of one batch, with its gradients and second moment in float64."""
    out_features, in_features = sides
    generator = torch.Generator().manual_seed(seed)
    inputs = skewed_tokens(tokens, in_features, rank=rank, seed=seed, rest=rest).view(4, -1, in_features)
    grads = torch.randn(tokens, gradient_rank or out_features, generator=generator)
    if gradient_rank:
        grads = grads @ torch.randn(gradient_rank, out_features, generator=generator)
    grads = grads.view(4, -1, out_features)
    weights = torch.randn(2, 4, generator=generator)
    layer = kind.empty(Shape(*sides, width=width), 2, TestMatrices(seed, CPU))
    layer.add(inputs, grads, weights, paired=False)
    gradients = torch.einsum("ks,sto,sti->koi", weights.double(), grads.double(), inputs.double())
    flat = inputs.flatten(0, 1).double()
    return layer, gradients, flat.T @ flat


def second_moments(model, names, rows):
    """The sum of x x^T over all tokens of every layer's inputs, in a float64 copy, row by row."""
    twin = copy.deepcopy(model).double()
    found = {name: [] for name in names}
    for name in names:
        twin.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: found[name].append(given[0][0]))
    for row in rows:
        twin(input_ids=torch.tensor([row.prompt + row.chosen]))
    return {name: torch.cat(own).T @ torch.cat(own) for name, own in found.items()}


def pass_over(model, rows, kind, *, width, objectives=SFT):
    targets = resolve_targets(model, lora_config(model, LoraSpec(r=2), base_model="tiny", revision=None))
    matrices = TestMatrices(0, CPU)
    bases = bases_of(objectives)
    layers = {
        name: kind.empty(Shape(*layer_sizes(module), min(width, *layer_sizes(module))), len(bases), matrices)
        for name, module in targets.items()
    }
    batches = one_fold(rows, max_tokens=60)
    assert len(rows) == 1 or not all(batch.attention_mask.all() for batch in batches)
    counts = gather(as_base(model), targets, layers, batches, bases, on_batch=lambda *_: None, mask_inputs=True)
    return layers, objective_coefficients(objectives, bases, counts)[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("kind", "tolerance"), [(MomentGradient, 1e-5), (MomentSketch, 1e-3)])
def test_one_pass_gives_the_dense_whitened_gradient(make, kind, tolerance):
    """Sketches as wide as the layers are exact too, up to float32; one layer of GPT-2 is too wide for that."""
    model, rows = make(), reference_rows(7, paired=False)

    layers, coefficients = pass_over(model, rows, kind, width=32)

    gradients = weight_gradients(model, layers, lambda twin: sft_loss(twin, rows))
    moments = second_moments(model, layers, rows)
    for name, layer in layers.items():
        expected = dense_whitened(gradients[name], moments[name], WHITENING)
        ours = reconstruct(whitened_factorization(layer, coefficients, min(expected.shape), WHITENING))
        full_basis = layer.moment.test.shape[1] == layer.shape.in_features
        assert (ours - expected).norm() < (tolerance if full_basis else 0.2) * expected.norm(), name


@pytest.mark.parametrize("objectives", [SFT, [Orpo(nll="full_sequence")]])
def test_padding_adds_nothing_and_layers_with_the_same_inputs_share_what_is_made_of_them(objectives, monkeypatch):
    model, rows, products = tiny_llama(), reference_rows(7, paired=True), []
    moment_of = TestMatrices.moment_of

    def watched(*arguments):
        products.append(moment_of(*arguments))
        return products[-1]

    monkeypatch.setattr(TestMatrices, "moment_of", watched)
    padded, _ = pass_over(model, rows, MomentSketch, width=4, objectives=objectives)

    # Query, key and value layers have the same inputs, and so have gate and up: four of seven are distinct.
    assert 7 * len({id(one) for one in products}) == 4 * len(products)
    alone = [pass_over(model, [row], MomentSketch, width=4, objectives=objectives)[0] for row in rows]

    for name, layer in padded.items():
        for part, tensor in layer.tensors().items():
            expected = sum(one[name].tensors()[part] for one in alone)
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("sides", SIDES)
def test_the_exact_direction_is_the_best_rank_of_the_dense_whitened_gradient(sides):
    layer, gradients, moment = random_layer(MomentGradient, sides, rank=3)
    coefficients = torch.tensor([1.0, -0.5], dtype=torch.float64)

    for whitening in (WHITENING, Whitening(damping=0.5, power=1.0)):
        direction = whitened_factorization(layer, coefficients, 4, whitening)

        whitened = dense_whitened(torch.einsum("k,koi->oi", coefficients, gradients), moment, whitening)
        assert (reconstruct(direction) - best(whitened, 4)).norm() < 1e-5 * whitened.norm()
        assert direction.energy == pytest.approx(whitened.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("kind", [MomentSketch, MomentGradient])
def test_the_slope_is_the_inner_product_with_the_gradient_that_is_whitened(kind, sides):
    layer, gradients, _ = random_layer(kind, sides, rank=3, gradient_rank=2)
    coefficients = torch.tensor([1.0, -0.5], dtype=torch.float64)

    direction = whitened_factorization(layer, coefficients, 2, WHITENING)

    gradient = torch.einsum("k,koi->oi", coefficients, gradients)
    assert direction.descent == pytest.approx((reconstruct(direction) * gradient).sum().item(), rel=1e-3)


@pytest.mark.parametrize("sides", SIDES)
def test_the_sketched_direction_is_exact_where_gradient_and_moment_have_small_rank(sides):
    layer, gradients, moment = random_layer(MomentSketch, sides, rank=3, gradient_rank=2, rest=0.0)
    coefficients = torch.tensor([1.0, -0.5], dtype=torch.float64)

    direction = whitened_factorization(layer, coefficients, 2, WHITENING)

    whitened = dense_whitened(torch.einsum("k,koi->oi", coefficients, gradients), moment, WHITENING)
    assert (reconstruct(direction) - whitened).norm() < 1e-3 * whitened.norm()


@pytest.mark.parametrize("sides", [(60, 90), (90, 60)])
def test_inner_products_of_whitened_gradients_are_unbiased(sides):
    estimates = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(7)
        inputs = skewed_tokens(120, sides[1], rank=3, seed=7).view(2, 60, -1)
        grads, weights = torch.randn(2, 60, sides[0], generator=generator), torch.randn(2, 2, generator=generator)
        layer = MomentSketch.empty(Shape(*sides, width=8), 2, TestMatrices(seed, CPU))
        layer.add(inputs, grads, weights, paired=False)
        spectrum = layer.moment.spectrum()
        gradients = torch.einsum("ks,sto,sti->koi", weights.double(), grads.double(), inputs.double())
        shift = WHITENING.damping * spectrum.mean
        own = spectrum.map(gradients, lambda values, shift=shift: (values + shift) ** -0.5).flatten(1)
        truth = own @ own.T
        scale = truth.diagonal().sqrt()
        estimates.append((whitened_gramian(layer, WHITENING) - truth) / torch.outer(scale, scale))
    errors = torch.stack(estimates)
    standard = errors.std(0) / len(errors) ** 0.5
    assert (errors.mean(0).abs() < 4 * standard).all()
    assert (standard < 0.05).all()


def test_the_stated_error_is_that_of_the_direction():
    ratios = []
    for seed in range(12):
        for sides in ((80, 120), (120, 80)):
            layer, gradients, _ = random_layer(MomentSketch, sides, rank=3, seed=seed, tokens=300, width=16)
            coefficients = torch.tensor([1.0, -0.5], dtype=torch.float64)
            spectrum = layer.moment.spectrum()
            direction = whitened_factorization(layer, coefficients, 2, WHITENING)
            shift = WHITENING.damping * spectrum.mean
            gradient = torch.einsum("k,koi->oi", coefficients, gradients)
            whitened = spectrum.map(gradient, lambda values, shift=shift: (values + shift) ** -0.5)
            ratios.append(direction.missed / (whitened - reconstruct(direction)).square().sum().item())
    ratios = torch.tensor(ratios)
    assert 0.8 < ratios.mean() < 1.2
    assert ratios.std() < 0.3


@pytest.mark.parametrize("kind", [MomentSketch, MomentGradient])
def test_sums_do_not_depend_on_how_rows_are_cut_into_batches(kind):
    generator = torch.Generator().manual_seed(0)
    inputs, grads = torch.randn(6, 5, 24, generator=generator), torch.randn(6, 5, 16, generator=generator)
    weights = torch.randn(2, 6, generator=generator)
    whole, parts = (kind.empty(Shape(16, 24, width=4), 2, TestMatrices(0, CPU)) for _ in range(2))

    whole.add(inputs, grads, weights, paired=False)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.add(inputs[rows], grads[rows], weights[:, rows], paired=False)

    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_layer_that_has_seen_nothing_is_left_as_it_is():
    layer = MomentSketch.empty(Shape(16, 24, width=4), 1, TestMatrices(0, CPU))

    layer.add(torch.zeros(1, 3, 24), torch.zeros(1, 3, 16), torch.ones(1, 1), paired=False)

    assert whitened_gramian(layer, WHITENING).item() == 0.0
    assert not whitened_factorization(layer, torch.ones(1), 2, WHITENING).values.any()


def test_the_spectrum_has_the_trace_and_the_large_eigenvalues_of_the_second_moment():
    tokens = skewed_tokens(5000, 60, rank=4, seed=3)
    moment = Moment.empty(TestMatrices(0, CPU).moment(60, 16))

    moment.add(tokens)
    spectrum = moment.spectrum()

    dense = tokens.double().T @ tokens.double()
    values = torch.linalg.eigvalsh(dense).flip(0)
    assert spectrum.mean == pytest.approx(dense.trace().item() / 60, rel=1e-5)
    torch.testing.assert_close(spectrum.values.flip(0)[:4], values[:4], rtol=1e-2, atol=0)
    kept = len(spectrum.values)
    assert (spectrum.values.flip(0) <= values[:kept] * (1 + 1e-5)).all()
    torch.testing.assert_close(spectrum.vectors.T @ spectrum.vectors, torch.eye(kept).double(), rtol=0, atol=1e-6)
