import errno
import json

import httpx2
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from d2lora.errors import ModelNotFound, ModelUnavailable, ModelUnsupported, ScratchFull, WeightsUnsafe
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.unit.worker.conftest import as_examples, one_fold, reference_rows
from worker.batches import make_batches
from worker.models import load, verify_head
from worker.statistics import score


def saved(tmp_path, model=None):
    (model or tiny_llama()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def load_here(name, **changes):
    return load(name, **{"revision": None, "dtype": "auto", "device": "cpu", **changes})


def test_a_directory_with_safetensors_is_loaded_frozen_and_in_float32(tmp_path):
    base = load_here(saved(tmp_path))

    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_identity_of_local_weights_follows_their_bytes(tmp_path):
    first = load_here(saved(tmp_path / "a", tiny_llama(seed=0))).identity
    again = load_here(saved(tmp_path / "b", tiny_llama(seed=0))).identity
    other = load_here(saved(tmp_path / "c", tiny_llama(seed=1))).identity

    assert first == again
    assert first.startswith("sha256:")
    assert first != other


def rewritten(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda at: (at / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        lambda at: rewritten(at / "tokenizer_config.json", chat_template="{{ messages[0].content }}"),
        lambda at: rewritten(at / "tokenizer.json", normalizer={"type": "Lowercase"}),
        lambda at: rewritten(at / "config.json", rms_norm_eps=1e-3),
    ],
    ids=["template", "template inside", "tokenizer", "configuration"],
)
def test_what_else_decides_the_numbers_is_known_beside_the_identity(tmp_path, change):
    before = load_here(saved(tmp_path))

    change(tmp_path)

    after = load_here(str(tmp_path))
    assert after.identity == before.identity
    assert after.configuration_sha256 != before.configuration_sha256


def test_where_a_model_was_saved_and_by_which_version_decides_nothing(tmp_path):
    before = load_here(saved(tmp_path / "a")).configuration_sha256
    saved(tmp_path / "b")
    rewritten(tmp_path / "b" / "config.json", transformers_version="5.0.0", _name_or_path="/elsewhere")
    (tmp_path / "b" / "README.md").write_text("# A model\n")

    assert load_here(str(tmp_path / "b")).configuration_sha256 == before


def test_the_licence_is_read_from_the_models_card(tmp_path):
    name = saved(tmp_path)
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")

    assert load_here(name).license == "mit"


def test_an_unknown_path_is_not_found():
    with pytest.raises(ModelNotFound, match="/nowhere/at/all"):
        load_here("/nowhere/at/all")


def test_a_hub_id_that_cannot_be_reached_is_not_found(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ModelNotFound, match="nobody/nothing"):
        load_here("nobody/nothing")


def test_pickle_weights_are_never_loaded(tmp_path):
    name = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")

    with pytest.raises(WeightsUnsafe, match="pickle"):
        load_here(name)


def test_an_encoder_decoder_is_refused(tmp_path):
    name = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "t5", "is_encoder_decoder": True}))

    with pytest.raises(ModelUnsupported, match="encoder-decoder"):
        load_here(name)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    name = saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "something_else"}))

    with pytest.raises(ModelUnsupported):
        load_here(name)


@pytest.mark.parametrize("taken", [("pad_token",), ("pad_token", "eos_token")], ids=["pad", "pad and eos"])
def test_a_token_without_an_embedding_fills_no_batch(taken):
    base = as_base(tiny_llama())
    expected = 0 if "eos_token" in taken else base.tokenizer.eos_token_id
    base.tokenizer.add_special_tokens({name: f"[{name}]" for name in taken})
    examples = as_examples(reference_rows(3, paired=False))

    (batch,) = make_batches(examples, [0] * 3, max_tokens=10_000, pad_token_id=base.pad_token_id)

    assert base.tokenizer.pad_token_id >= base.vocabulary
    assert base.pad_token_id == expected
    assert torch.isfinite(score(base, batch).chosen_logps).all()


@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_the_head_gives_the_models_own_logits(model):
    verify_head(as_base(model))


def test_a_head_that_is_not_understood_is_refused():
    model = tiny_llama()
    model.register_forward_hook(lambda _module, _inputs, output: setattr(output, "logits", output.logits * 2))

    with pytest.raises(ModelUnsupported, match="logits"):
        verify_head(as_base(model))


def test_soft_capped_logits_are_reproduced():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    base = as_base(Gemma2ForCausalLM(config).eval())

    verify_head(base)

    (batch,) = one_fold(reference_rows(3, paired=False))
    logits = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    expected = (logps * batch.completion_mask[:, 1:]).sum(1)
    torch.testing.assert_close(score(base, batch).chosen_logps, expected, rtol=1e-5, atol=1e-5)


def hub_error(status):
    request = httpx2.Request("GET", "http://hub/config.json")
    return HfHubHTTPError("the hub", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (hub_error(503), ModelUnavailable),
        (hub_error(429), ModelUnavailable),
        (httpx2.ConnectError("refused"), ModelUnavailable),
        (OSError(errno.EIO, "Input/output error"), ModelUnavailable),
        (OSError(errno.ENOSPC, "No space left on device"), ScratchFull),
        (hub_error(404), ModelNotFound),
        (FileNotFoundError("config.json"), ModelNotFound),
    ],
)
def test_an_outage_is_no_missing_model(monkeypatch, cause, expected):
    """transformers wraps what the hub raises into an OSError of its own; a disk's errors come as they are."""

    def refuse(*_arguments, **_named):
        if isinstance(cause, OSError) and cause.errno:
            raise cause
        raise OSError("cannot load the configuration") from cause

    monkeypatch.setattr("worker.models.AutoConfig.from_pretrained", refuse)

    with pytest.raises(expected):
        load("some/model", revision=None, dtype="auto", device="cpu")
