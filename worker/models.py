"""Loading a base model, and what a pass over it needs to know: its decoder, its head, its target layers.

Only safetensors and GGUF files are read, and no code that comes with a model is run.
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from d2lora.errors import ModelNotFound, ModelUnavailable, ModelUnsupported, OutOfMemory, ScratchFull, WeightsUnsafe
from d2lora.initializations import Quantization
from d2lora.models import HubModel, LocalModel, locate
from d2lora.scratch import is_full
from worker.devices import pick_device
from worker.loading import loading_plan
from worker.logprobs import Head
from worker.quantization import dequantized_weight, prepare

_OUTAGES = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_PROBE_TOKENS = 8

_CONFIGURATION = (
    "config.json",
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)
"""The files beside the weights that decide what the model computes, and what it makes of text."""

_ORIGIN = {"_name_or_path", "name_or_path", "transformers_version"}


@dataclass(frozen=True)
class BaseModel:
    """A frozen model, ready for passes over it."""

    name: str
    """As the request wrote it; goes into ``adapter_config.json``."""
    revision: str | None
    """Commit of a hub model; None for local files."""
    weights_sha256: str | None
    """Over the weight files of a local model, in the order of their names; None for hub models."""
    license: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    configuration_sha256: str | None = None
    """Over configuration, tokenizer and chat template of a local model; None for hub models, whose commit pins them."""

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the embeddings are, also of a model that is spread over several devices."""
        return _device_of(self.model.get_input_embeddings())

    @property
    def parameter_bytes(self) -> int:
        """Memory that the parameters take."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def pad_token_id(self) -> int:
        """A token with an embedding, to fill up batches; which one is of no consequence, since it is masked."""
        rows = len(self.model.get_input_embeddings().weight)
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return int(next((token for token in candidates if token is not None and 0 <= token < rows), 0))

    @property
    def identity(self) -> str:
        """What pins the weights: a commit, or a digest of the files."""
        return self.revision or f"sha256:{self.weights_sha256}"

    def hidden_states(
        self, input_ids: Int[Tensor, "S T"], attention_mask: Int[Tensor, "S T"]
    ) -> Float[Tensor, "S T H"]:
        """Return the decoder's last hidden states, which `head` turns into logits; on the head's device."""
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.to(_device_of(self.model.get_output_embeddings()))

    @property
    def head(self) -> Head:
        """The function from hidden states to logits, with the model's own scaling and soft capping."""
        config = self.model.config.get_text_config()
        linear = self.model.get_output_embeddings()
        multiplier = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        cap = getattr(config, "final_logit_softcapping", None)

        def head(states: Tensor) -> Tensor:
            logits: Tensor = linear(states)
            if multiplier != 1.0:
                logits = logits * multiplier
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return head


def load(
    base_model: str, *, revision: str | None, dtype: str, device: str, quantization: Quantization | None = None
) -> BaseModel:
    """Return the model in evaluation mode, every weight frozen, on the device.

    ``dtype="auto"`` means float32 on a CPU and the checkpoint's own type elsewhere. On a machine with several CUDA
    devices, a model that one of them does not hold is spread over all.

    Raises:
        ModelNotFound: no such directory, file or hub ID.
        WeightsUnsafe: only pickle weights exist.
        ModelUnsupported: no causal language model, a head whose logits we cannot reproduce, or weights in a format
            that cannot be loaded as requested.
        OutOfMemory: all devices together do not hold it.
    """
    place = locate(base_model)
    target = torch.device(pick_device(device))
    arguments: dict[str, Any] = {"trust_remote_code": False}
    match place:
        case HubModel(id=source):
            arguments["revision"] = revision
        case LocalModel(directory=directory, gguf_file=gguf_file):
            source = str(directory)
            if gguf_file is not None:
                arguments["gguf_file"] = gguf_file
    torch_dtype: Any = getattr(torch, dtype, "auto")
    if dtype == "auto" and target.type == "cpu":
        torch_dtype = torch.float32
    with _translated_errors(base_model):
        # A GGUF file holds its own configuration, which only the model's loader reads in full.
        config = None if "gguf_file" in arguments else AutoConfig.from_pretrained(source, **arguments)
        plan = loading_plan(base_model, config, dtype=torch_dtype, target=target, quantization=quantization)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch_dtype, use_safetensors=True, **plan.arguments, **arguments
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    if "device_map" not in plan.arguments:
        model = model.to(target)
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()) - {target.type}:
        raise OutOfMemory("the base model does not fit on the devices; use quantization 4bit, or a larger machine")
    if plan.quantization is not None:
        prepare(model)
    loaded = BaseModel(
        name=base_model,
        revision=getattr(model.config, "_commit_hash", None) if isinstance(place, HubModel) else None,
        weights_sha256=_digest(place.weight_files) if isinstance(place, LocalModel) else None,
        license=_license(place),
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        configuration_sha256=_configuration_digest(place.directory) if isinstance(place, LocalModel) else None,
    )
    verify_head(loaded)
    verify_causality(loaded)
    return loaded


def commit_of(hub_id: str, revision: str | None) -> str | None:
    """Return the commit that a revision of a hub model stands for now; None if the hub does not say.

    Raises:
        ModelNotFound: no such hub ID or revision, or the hub is out of reach and this machine has no copy.
        ModelUnsupported: no model that transformers knows.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    with _translated_errors(hub_id):
        config = AutoConfig.from_pretrained(hub_id, revision=revision, trust_remote_code=False)
    return getattr(config, "_commit_hash", None)


def _device_of(module: nn.Module) -> torch.device:
    """Return where embeddings or a head compute."""
    return module.weight.device  # type: ignore[return-value]  # both have a weight


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a Linear or Conv1D layer, also when its weight is packed in 4 bits."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def weight_norm(module: nn.Module) -> float:
    """Return the Frobenius norm of a layer's weight, also of a quantized one."""
    return dequantized_weight(module).float().norm().item()


def verify_head(base: BaseModel) -> None:
    """Check on a few tokens that decoder and head give the model's own logits.

    Raises:
        ModelUnsupported: they do not; log-probabilities, and so the adapter, would be wrong.
    """
    ids, mask = _probe(base)
    with torch.no_grad():
        ours = base.head(base.hidden_states(ids, mask)).float()
        logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if not torch.isfinite(logits).all():
        return  # the pass itself reports where numbers stop being finite
    # The same products in the same order, but for a scaling or a soft cap that may round in another precision.
    tolerance = max(1e-5, 3 * torch.finfo(base.model.dtype).eps)
    theirs = logits.float().to(ours.device)
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > tolerance * theirs.abs().max():
        raise ModelUnsupported(
            f"base_model: {base.name!r} ({type(base.model).__name__}) turns hidden states into logits "
            "in a way that this version does not know"
        )


def verify_causality(base: BaseModel) -> None:
    """Check on a few tokens that a hidden state depends on the tokens up to its own, and on no later ones.

    Rows are padded on the right, so a model that looks ahead would also see the padding.

    Raises:
        ModelUnsupported: it depends on later ones, or on none through which a gradient comes back.
    """
    ids, mask = _probe(base)
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        embedded.append(output.requires_grad_())
        return output

    handle = base.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            hidden = base.hidden_states(ids, mask)[0, _PROBE_TOKENS // 2].float()
            # Not the plain sum, which a layer norm keeps constant.
            (gradient,) = torch.autograd.grad(
                (hidden * torch.linspace(1, 2, len(hidden)).to(hidden)).sum(), embedded[0]
            )
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "not have been used in the graph" not in str(error):
            raise
        raise _no_gradient(base) from error
    finally:
        handle.remove()
    sizes = gradient[0].float().norm(dim=-1)
    if not torch.isfinite(sizes).all():
        return
    if sizes.max() == 0:
        raise _no_gradient(base)
    if sizes[_PROBE_TOKENS // 2 + 1 :].max() > 1e-6 * sizes.max():
        raise ModelUnsupported(
            f"base_model: {base.name!r} ({type(base.model).__name__}) predicts a token from later ones; "
            "the objectives are defined for causal language models"
        )


def _probe(base: BaseModel) -> tuple[Int[Tensor, "1 T"], Int[Tensor, "1 T"]]:
    """Return a few tokens, and their attention mask."""
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=base.device)[None] % base.vocabulary
    return ids, torch.ones_like(ids)


def _no_gradient(base: BaseModel) -> ModelUnsupported:
    return ModelUnsupported(
        f"base_model: {base.name!r} ({type(base.model).__name__}) lets no gradient through to its embeddings"
    )


@contextmanager
def _translated_errors(base_model: str) -> Iterator[None]:
    """Turn the libraries' errors into ours; nobody else looks at their wording."""
    try:
        yield
    except OSError as error:
        text = str(error)
        if re.search(r"pytorch_model\.bin|safetensors.*(not|no file)", text) and "safetensors" in text:
            raise WeightsUnsafe(f"base_model: {base_model!r} has no safetensors weights") from error
        if _is_outage(error):
            raise ModelUnavailable(f"base_model: {base_model!r} cannot be reached just now") from error
        if is_full(error):
            raise ScratchFull(f"no room left for base_model {base_model!r}; free space") from error
        raise ModelNotFound(
            f"base_model: {base_model!r} cannot be loaded; "
            "it does not exist, the revision is unknown, or the hub is out of reach"
        ) from error
    except ValueError as error:
        if re.search(r"[Uu]nrecognized|does not recognize|not supported|trust_remote_code", str(error)):
            raise ModelUnsupported(
                f"base_model: {base_model!r} is no causal language model that transformers knows without remote code"
            ) from error
        raise


def _is_outage(error: BaseException | None) -> bool:
    """Whether the hub or a disk failed in a way that another time it may not."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code == 429 or error.response.status_code >= 500
        if isinstance(error, HTTPError) or getattr(error, "errno", None) in _OUTAGES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _configuration_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _CONFIGURATION for path in directory.glob(pattern) if path.is_file()}):
        content = hashlib.sha256(_without_origin(path)).hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _without_origin(path: Path) -> bytes:
    """Return a file's content, of a configuration without where it was saved and by which version."""
    content = path.read_bytes()
    if not path.name.endswith("config.json"):
        return content
    fields = json.loads(content)
    kept = {name: value for name, value in fields.items() if name not in _ORIGIN}
    return json.dumps(kept, sort_keys=True).encode()


def _license(place: LocalModel | HubModel) -> str:
    """Return the licence that the model's own card names, or "unknown"."""
    readers: list[Callable[[], str | None]] = []
    if isinstance(place, LocalModel):
        if place.gguf_file is not None:
            readers.append(lambda: _gguf_license(place.weight_files[0]))
        readers.append(lambda: _card_license(place.directory / "README.md"))
    else:
        readers.append(lambda: _hub_license(place.id))
    return next((name for reader in readers if (name := reader())), "unknown")


def _card_license(card: Path) -> str | None:
    if not card.exists():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"\A---\n.*?^license:\s*([\w.\-]+)\s*$", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def _gguf_license(path: Path) -> str | None:
    from gguf import GGUFReader  # noqa: PLC0415  # only GGUF models need it

    entry = GGUFReader(path).fields.get("general.license")
    return None if entry is None else bytes(entry.parts[-1]).decode("utf-8", errors="replace")


def _hub_license(name: str) -> str | None:
    from huggingface_hub import ModelCard  # noqa: PLC0415  # only hub models need it

    try:
        data = ModelCard.load(name).data
    except (OSError, ValueError):  # offline, or a card that does not parse
        return None
    return getattr(data, "license", None)
