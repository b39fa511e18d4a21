import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.gradients import DenseGradient
from worker.low_rank import LowRank
from worker.matrices import Shape, TestMatrices
from worker.sketching import Sketch

CPU = torch.device("cpu")


def random_batch(out_features, in_features, *, rows, tokens, seed, paired=True, bases=3):
    generator = torch.Generator().manual_seed(seed)
    sequences = rows * (2 if paired else 1)
    sizes = [(sequences, tokens, in_features), (sequences, tokens, out_features), (bases, sequences)]
    return tuple(torch.randn(*size, generator=generator) for size in sizes)


def dense(inputs, grads, weights):
    """G_k = sum_s a_ks D_s^T X_s, in float64."""
    return torch.einsum("ks,sto,sti->koi", weights.double(), grads.double(), inputs.double())


def low_rank_batch(out_features, in_features, rank, *, seed):
    """A batch whose gradients have at most the given rank: so many tokens, all in one sequence."""
    inputs, grads, weights = random_batch(out_features, in_features, rows=1, tokens=rank, seed=seed, paired=False)
    return inputs, grads, weights


def reconstruct(factorization: LowRank) -> torch.Tensor:
    return (factorization.left * factorization.values) @ factorization.right


@settings(max_examples=25)
@given(
    sides=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 6),
    paired=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_sketch_is_the_product_of_the_gradients_with_its_test_matrices(sides, rows, tokens, paired, seed):
    shape = Shape(*sides, width=2)
    matrices = TestMatrices(seed, CPU)
    inputs, grads, weights = random_batch(*sides, rows=rows, tokens=tokens, seed=seed, paired=paired)
    sketch = Sketch.empty(shape, 3, matrices)

    sketch.add(inputs, grads, weights, paired=paired)

    gradients = dense(inputs, grads, weights)
    oriented = gradients.mT if shape.transposed else gradients
    omega, psi = matrices.omega(shape).double(), matrices.psi(shape).dense().double()
    torch.testing.assert_close(sketch.range_sketch.mT.double(), oriented @ omega, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sketch.corange_sketch.double(), psi @ oriented, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(30, 50), (50, 30), (40, 40)])
def test_a_gradient_of_small_rank_is_recovered_exactly(sides):
    inputs, grads, weights = low_rank_batch(*sides, rank=5, seed=1)
    sketch = Sketch.empty(Shape(*sides, width=6), 3, TestMatrices(0, CPU))
    coefficients = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    sketch.add(inputs, grads, weights, paired=False)
    result = sketch.factorize(coefficients, 5)

    expected = torch.einsum("k,koi->oi", coefficients, dense(inputs, grads, weights))
    torch.testing.assert_close(reconstruct(result).double(), expected, rtol=1e-3, atol=1e-4 * expected.norm().item())
    assert result.missed < 1e-8 * result.energy


def test_the_exact_mode_gives_the_dense_singular_value_decomposition():
    inputs, grads, weights = random_batch(12, 30, rows=4, tokens=5, seed=2)
    layer = DenseGradient.empty(Shape(12, 30, width=4), 3, TestMatrices(0, CPU))
    coefficients = torch.tensor([0.3, 1.0, -1.0], dtype=torch.float64)

    layer.add(inputs, grads, weights, paired=True)
    result = layer.factorize(coefficients, 12)

    expected = torch.einsum("k,koi->oi", coefficients, dense(inputs, grads, weights))
    torch.testing.assert_close(reconstruct(result).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.values.double(), torch.linalg.svdvals(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Sketch, DenseGradient])
def test_factors_are_orthonormal_with_a_fixed_sign(kind):
    inputs, grads, weights = random_batch(20, 33, rows=4, tokens=5, seed=3)
    layer = kind.empty(Shape(20, 33, width=6), 3, TestMatrices(0, CPU))
    layer.add(inputs, grads, weights, paired=True)

    result = layer.factorize(torch.ones(3, dtype=torch.float64), 4)
    flipped = layer.factorize(-torch.ones(3, dtype=torch.float64), 4)

    size = len(result.values)
    torch.testing.assert_close(result.left.T @ result.left, torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.right @ result.right.T, torch.eye(size), rtol=0, atol=1e-5)
    largest = result.right.gather(1, result.right.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(reconstruct(flipped), -reconstruct(result), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Sketch, DenseGradient])
def test_sums_do_not_depend_on_how_rows_are_cut_into_batches(kind):
    inputs, grads, weights = random_batch(16, 24, rows=6, tokens=4, seed=4)
    whole, parts = (kind.empty(Shape(16, 24, width=4), 3, TestMatrices(0, CPU)) for _ in range(2))

    whole.add(inputs, grads, weights, paired=True)
    for rows in (torch.tensor([0]), torch.tensor([1, 2, 3]), torch.tensor([4, 5])):
        both = torch.cat([rows, rows + 6])
        parts.add(inputs[both], grads[both], weights[:, both], paired=True)

    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


def test_rows_processed_in_several_chunks_give_the_same_sums(monkeypatch):
    inputs, grads, weights = random_batch(16, 24, rows=7, tokens=4, seed=4)
    whole, chunked = (Sketch.empty(Shape(16, 24, width=4), 3, TestMatrices(0, CPU)) for _ in range(2))

    whole.add(inputs, grads, weights, paired=True)
    monkeypatch.setattr("worker.sketching._TRANSIENT_ELEMENTS", 1)
    chunked.add(inputs, grads, weights, paired=True)

    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(chunked.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(16, 24), (24, 24), (32, 24)])
def test_layers_with_the_same_inputs_share_products_and_nothing_else(sides):
    matrices, other = TestMatrices(0, CPU), TestMatrices(0, CPU)
    shape = Shape(*sides, width=4)
    products = []
    inputs, _, weights = random_batch(*sides, rows=2, tokens=3, seed=0)
    for seed in range(4):
        grads = random_batch(*sides, rows=2, tokens=3, seed=seed)[1]
        if seed == 2:
            inputs *= 2  # in place: the same tensor, and no longer the same numbers
        if seed == 3:
            # Another tensor, where possible at the address of the one that is gone.
            address, inputs = inputs.data_ptr(), None
            kept = [torch.randn(4, 3, 24) for _ in range(8)]
            inputs = next((one for one in kept if one.data_ptr() == address), kept[0])
        sharing, alone = Sketch.empty(shape, 3, matrices), Sketch.empty(shape, 3, other)

        sharing.add(inputs.detach(), grads, weights, paired=True)
        alone.add(inputs.clone(), grads, weights, paired=True)

        products.append((matrices.psi_of if shape.transposed else matrices.omega_of)(shape, inputs))
        for name, tensor in alone.tensors().items():
            assert torch.equal(sharing.tensors()[name], tensor), (seed, name)
    assert products[0] is products[1]


@pytest.mark.parametrize("paired", [True, False])
def test_the_row_gramian_sums_the_inner_products_of_each_rows_own_gradients(paired):
    inputs, grads, weights = random_batch(10, 14, rows=5, tokens=4, seed=5, paired=paired)
    layer = DenseGradient.empty(Shape(10, 14, width=4), 3, TestMatrices(0, CPU))

    layer.add(inputs, grads, weights, paired=paired)

    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row in range(5):
        own = [row, row + 5] if paired else [row]
        gradients = dense(inputs[own], grads[own], weights[:, own])
        expected += torch.einsum("joi,koi->jk", gradients, gradients)
    torch.testing.assert_close(layer.row_gramian, expected, rtol=1e-4, atol=1e-3)


def test_a_full_co_range_sketch_gives_exact_inner_products():
    inputs, grads, weights = random_batch(9, 14, rows=5, tokens=4, seed=6)
    shape = Shape(9, 14, width=7)
    sketch, exact = (kind.empty(shape, 3, TestMatrices(0, CPU)) for kind in (Sketch, DenseGradient))

    for layer in (sketch, exact):
        layer.add(inputs, grads, weights, paired=True)

    assert shape.corange_width == shape.longer
    torch.testing.assert_close(sketch.inner_products(sketch), exact.inner_products(exact), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sketch.row_gramian, exact.row_gramian, rtol=1e-4, atol=1e-3)


def test_inner_products_are_unbiased_over_seeds():
    inputs, grads, weights = random_batch(20, 60, rows=3, tokens=4, seed=7)
    shape = Shape(20, 60, width=3)
    exact = torch.einsum("joi,koi->jk", dense(inputs, grads, weights), dense(inputs, grads, weights))

    estimates = []
    for seed in range(300):
        sketch = Sketch.empty(shape, 3, TestMatrices(seed, CPU))
        sketch.add(inputs, grads, weights, paired=True)
        estimates.append(sketch.inner_products(sketch))
    estimates = torch.stack(estimates)

    error = estimates.std(0) / 300**0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()


def decaying(side, rank, *, seed):
    """Inputs and gradients of one sequence whose G has singular values 0.8^j."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = 0.8 ** torch.arange(rank)
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for _ in range(2))
    return (right * spectrum).T[None].contiguous(), left.T[None].contiguous(), (left * spectrum) @ right.T


def test_the_missed_energy_is_estimated_without_much_bias():
    inputs, grads, matrix = decaying(80, 40, seed=0)
    one = torch.ones(1, 1)

    estimates, truths = [], []
    for seed in range(60):
        sketch = Sketch.empty(Shape(80, 80, width=8), 1, TestMatrices(seed, CPU))
        sketch.add(inputs, grads, one, paired=False)
        result = sketch.factorize(one[0].double(), 8)
        estimates.append(result.missed)
        truths.append((reconstruct(result) - matrix).square().sum().item())

    assert sum(estimates) / sum(truths) == pytest.approx(1.0, abs=0.3)


def test_a_wide_sketch_keeps_nearly_all_of_the_best_rank():
    inputs, grads, matrix = decaying(80, 40, seed=0)
    sketch = Sketch.empty(Shape(80, 80, width=16), 1, TestMatrices(0, CPU))

    sketch.add(inputs, grads, torch.ones(1, 1), paired=False)
    result = sketch.factorize(torch.ones(1, dtype=torch.float64), 4)

    best = torch.linalg.svdvals(matrix)[:4].square().sum()
    captured = 2 * (reconstruct(result) * matrix).sum() - result.kept
    assert captured / best > 0.97


def test_the_same_seed_gives_the_same_matrices_and_another_gives_others():
    shape = Shape(12, 20, width=3)

    first, again, other = (TestMatrices(seed, CPU).omega(shape) for seed in (5, 5, 6))

    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("length", [40, 67, 200, 1536])
def test_no_two_entries_are_confused_by_folding(length):
    psi = TestMatrices(0, CPU).psi(Shape(length, length, width=8)).dense()

    cosines = torch.corrcoef(psi.T) - torch.eye(length)

    assert psi.shape == (16, length)
    assert cosines.abs().max() < 0.999


def test_a_folded_matrix_keeps_squared_norms_on_average():
    shape = Shape(300, 300, width=8)
    spike, spread = torch.zeros(300), torch.randn(300, generator=torch.Generator().manual_seed(0))
    spike[7] = spike[7 + 37] = spike[7 + 39] = 1.0  # one block folds the second, the other the third onto the first

    for vector in (spike, spread):
        norms = torch.stack([TestMatrices(seed, CPU).psi(shape).of(vector).square().sum() for seed in range(400)])
        ratio = norms / 16 / vector.square().sum()
        assert abs(ratio.mean().item() - 1) < 4 * (ratio.std() / 400**0.5).item()


def test_cutting_keeps_the_largest_values_and_what_is_known_of_the_whole():
    full = LowRank(torch.eye(5)[:, :3], torch.tensor([3.0, 2.0, 1.0]), torch.eye(4)[:3], energy=14.5, missed=0.25)

    cut = full.cut(1)

    assert cut.kept == pytest.approx(9.0)
    assert (cut.energy, cut.missed) == (14.5, 0.25)
