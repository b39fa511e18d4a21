import copy
import os
import weakref

import pytest
import torch

import worker.statistics
from d2lora.errors import ModelNotFound, NumericalFailure
from d2lora.initializations import Dpo, Orpo, Sft
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.unit.worker.conftest import one_fold, reference_rows
from tests.unit.worker.test_statistics import empty, targets_of
from worker.checkpointing import activation_checkpointing
from worker.factors import Factors, adapted
from worker.model_cache import ModelCache
from worker.models import commit_of, load
from worker.objectives import bases_of
from worker.sketching import Sketch
from worker.statistics import gather, score

BASES = bases_of([Sft(), Dpo(), Orpo(nll="full_sequence")])


def saved(path, model=None):
    (model or tiny_llama()).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


class Recorder:
    """Loads for real, and notes what was asked for and which earlier models were still in memory then."""

    def __init__(self):
        self.loaded, self.alive_then, self._models = [], [], {}

    def __call__(self, base_model, **how):
        self.alive_then.append({name for name, model in self._models.items() if model() is not None})
        base = load(base_model, **how)
        self.loaded.append(base_model)
        self._models[base_model] = weakref.ref(base.model)
        return base


def take(cache, name, **changes):
    return cache.load(name, **{"revision": None, "dtype": "float32", "device": "cpu", **changes})


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def names(tmp_path):
    return [saved(tmp_path / name, tiny_llama(seed=seed)) for seed, name in enumerate("abc")]


def size_of(name):
    return load(name, revision=None, dtype="float32", device="cpu").parameter_bytes


def test_the_size_of_a_model_is_that_of_its_parameters():
    assert as_base(tiny_llama()).parameter_bytes == sum(4 * one.numel() for one in tiny_llama().parameters())


def test_a_model_is_loaded_once_and_gives_the_same_numbers(names, recorder):
    cache = ModelCache(0, loader=recorder)
    (batch,) = one_fold(reference_rows(3, paired=True))

    first = score(take(cache, names[0]), batch)
    again = score(take(cache, names[0]), batch)

    assert recorder.loaded == names[:1]
    assert torch.equal(first.chosen_logps, again.chosen_logps)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"quantization": "8bit"}],
    ids=["dtype", "quantization"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_another_precision_is_another_model(names, recorder, changes):
    cache = ModelCache(10**9, loader=recorder)

    take(cache, names[0])
    take(cache, names[0], **changes)

    assert len(recorder.loaded) == 2


def test_without_room_beside_it_a_model_is_gone_before_the_next_is_loaded(names, recorder):
    cache = ModelCache(0, loader=recorder)

    for name in [*names[:2], names[0]]:
        take(cache, name)

    assert recorder.alive_then == [set(), set(), set()]


def test_the_least_recently_used_model_goes_first(names, recorder):
    cache = ModelCache(size_of(names[0]), loader=recorder)
    a, b, c = names

    for name in (a, b, a, c):  # c needs room: a was used last, so b goes
        take(cache, name)
    take(cache, a)

    assert recorder.loaded == [a, b, c]
    assert recorder.alive_then[2] == {a}


def test_the_model_in_use_may_be_larger_than_the_limit(names, recorder):
    cache = ModelCache(1, loader=recorder)

    take(cache, names[0])
    take(cache, names[0])

    assert len(recorder.loaded) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_files_that_have_changed_are_loaded_anew(names, recorder, file, tmp_path):
    cache = ModelCache(10**9, loader=recorder)
    take(cache, names[0])
    path = tmp_path / "a" / file
    about = path.stat()

    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    take(cache, names[0])

    assert len(recorder.loaded) == 2


def test_new_weights_at_the_same_path_give_the_new_identity(names, tmp_path):
    cache = ModelCache(10**9)
    before = take(cache, names[0]).identity

    saved(tmp_path / "a", tiny_llama(seed=7))

    assert take(cache, names[0]).identity == load(names[0], revision=None, dtype="float32", device="cpu").identity
    assert take(cache, names[0]).identity != before


def test_another_spelling_of_a_path_is_the_same_model_under_its_own_name(names, recorder, tmp_path, monkeypatch):
    cache = ModelCache(0, loader=recorder)
    monkeypatch.chdir(tmp_path)

    assert take(cache, names[0]).name == names[0]
    assert take(cache, "./a").name == "./a"
    assert len(recorder.loaded) == 1


def test_a_load_that_fails_leaves_the_others_usable(names, recorder, tmp_path):
    cache = ModelCache(10**9, loader=recorder)
    take(cache, names[0])

    with pytest.raises(ModelNotFound):
        take(cache, str(tmp_path / "nothing"))
    take(cache, names[0])

    assert len(recorder.loaded) == 1


def test_a_cleared_cache_keeps_nothing(names, recorder):
    cache = ModelCache(10**9, loader=recorder)
    for name in names[:2]:
        take(cache, name)

    cache.clear()
    take(cache, names[0])

    assert recorder.alive_then[-1] == set()


def test_a_commit_is_taken_as_it_is_and_a_branch_needs_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert commit_of("nobody/nothing", "0123456789" * 4) == "0123456789" * 4
    with pytest.raises(ModelNotFound, match="nobody/nothing"):
        commit_of("nobody/nothing", "main")


def state_of(model):
    """What a pass switches on: hooks, modes, flags, and the weights themselves."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [
            (
                name,
                module.training,
                getattr(module, "gradient_checkpointing", None),
                [len(vars(module)[h]) for h in hooks],
            )
            for name, module in model.named_modules()
        ],
        "parameters": [(name, one.requires_grad, one.grad) for name, one in model.named_parameters()],
        "config": copy.deepcopy(model.config.to_dict()),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_unaltered(model, before):
    after = state_of(model)
    weights_before, weights_after = before.pop("weights"), after.pop("weights")
    assert after == before
    assert all(torch.equal(weights_after[name], value) for name, value in weights_before.items())


def failing_forward(model, monkeypatch):
    monkeypatch.setattr(worker.statistics, "_scores", raising)


def failing_backward(model, monkeypatch):
    monkeypatch.setattr(Sketch, "add", raising)


def raising(*_, **__):
    raise NumericalFailure("on purpose")


@pytest.mark.parametrize("fail", [failing_forward, failing_backward])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_pass_that_fails_leaves_the_model_as_it_was(make, checkpointing, fail, monkeypatch):
    base = as_base(make())
    targets = targets_of(base.model)
    (batch,) = one_fold(reference_rows(3, paired=True))
    before = state_of(base.model)
    expected = score(base, batch).chosen_logps
    fail(base.model, monkeypatch)

    with pytest.raises(NumericalFailure, match="on purpose"), activation_checkpointing(base, enabled=checkpointing):
        gather(base, targets, empty(targets, Sketch, bases=len(BASES)), [batch], BASES, on_batch=lambda *_: None)

    monkeypatch.undo()
    assert_unaltered(base.model, before)
    assert torch.equal(score(base, batch).chosen_logps, expected)


def test_an_adapted_forward_that_fails_leaves_the_model_as_it_was():
    base = as_base(tiny_llama())
    targets = targets_of(base.model)
    factors = {
        name: Factors(torch.ones(2, module.in_features), torch.ones(module.out_features, 2))
        for name, module in targets.items()
    }
    before = state_of(base.model)

    with pytest.raises(NumericalFailure), adapted(targets, factors, scaling=1.0):
        raising()

    assert_unaltered(base.model, before)
