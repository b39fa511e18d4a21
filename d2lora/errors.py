"""Every error a caller can cause or must be told about.

    D2LoraError
    ├── RequestInvalid              422  a request that cannot be understood or kept
    │   ├── ObjectiveUnavailable    422  the rows do not carry what the objective needs
    │   └── IdempotencyMismatch     422  the key was used before, with another body
    ├── Unauthorized                401  no key, or a wrong one
    ├── NotFound                    404  no such resource (for this tenant)
    ├── Conflict                    409  the resource's state forbids the move
    ├── RequestTooLarge             413  the body is over the limit
    ├── DatasetInvalid              422  rows at fault, named by number
    │   ├── DatasetEmpty            422
    │   ├── DatasetEncodingInvalid  422  not UTF-8
    │   ├── DatasetSyntaxInvalid    422  not JSON, CSV or Parquet where it should be
    │   ├── SchemaUnknown           422  no known set of columns
    │   ├── SchemaMixed             422  two kinds of rows in one dataset
    │   ├── CompletionEmpty         422  nothing to learn from in a row
    │   ├── ChosenEqualsRejected    422  a preference that prefers nothing
    │   └── RowsTooLong             422  no row fits ``max_length``
    ├── ModelError                  422  the base model cannot be used
    │   ├── ModelNotFound           422
    │   ├── ModelNotAllowed         422  not on this service's list
    │   ├── WeightsUnsafe           422  only pickle weights
    │   ├── ModelUnsupported        422  an architecture or head that would give a wrong adapter
    │   └── TargetInvalid           422  target_modules
    │       ├── TargetsMissing      422  nothing matches
    │       ├── TargetUnsupported   422  a match that cannot carry LoRA correctly
    │       └── RankTooLarge        422  r above min(in_features, out_features)
    ├── ServiceUnreachable          503  the client cannot reach the service
    ├── UnknownProblem                   a code that this version of the client does not know
    └── JobError                    500  the job itself failed
        ├── NumericalFailure        500  a NaN or an infinity, with the layer
        ├── OutOfMemory             500  one row alone does not fit
        ├── StorageFull             507
        │   └── ScratchFull         507  a worker's own disk (retried)
        ├── StorageUnavailable      503  (retried)
        ├── StoreUnavailable        503  the database (retried)
        ├── BrokerUnavailable       503  wake-ups wait in the outbox
        ├── ChecksumMismatch        500  bytes read are not the bytes written
        ├── DeviceFailure           503  the accelerator is broken until its process ends (retried)
        ├── FormatMismatch          503  another version of the worker wrote a file (retried)
        │   └── FormatOutdated      503  an older version wrote it; the job begins anew
        ├── StatisticsTooNew        503  a newer version wrote what ``based_on`` names (retried)
        ├── ShardGone               500  a file of a job in shards is not there; the job begins anew
        ├── ModelUnavailable        503  the hub or the disk with the base model is away (retried)
        ├── WorkerLost              500  the worker died too often on this job
        └── InternalError           500  everything else; details stay in the log

The class decides the public code and whether another attempt makes sense. A message names the value at fault
and the remedy, and never quotes a data row. Constructors keep their arguments, so that errors can be pickled.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class ProblemItem(BaseModel):
    """One fault inside a request: where it is and what is wrong there."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    detail: str
    """What is wrong, in a sentence."""
    pointer: str | None = None
    """JSON pointer into the request body, such as ``#/lora/r``; for a parameter its place and name, ``query/limit``."""
    row: int | None = None
    """Number of the dataset row, counted from 1."""
    field: str | None = None
    """Column of that row."""


class Problem(BaseModel):
    """An error as it crosses HTTP and as it is stored with a failed job (RFC 9457)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str = "about:blank"
    """As RFC 9457 has it where ``title`` and ``status`` say all; ``code`` tells errors apart."""
    title: str
    """What kind of error it is; the same for all of a ``code``."""
    status: int
    """The HTTP status that it has, or would have."""
    detail: str
    """What is wrong with this request or job, and where there is one the remedy; it never quotes a row."""
    code: str
    """Stable and machine-readable; scripts switch on this."""
    retryable: bool = False
    """Whether the same request may succeed later without being changed."""
    errors: list[ProblemItem] = []
    """Each fault, with the field or the row where it is."""
    request_id: str | None = None
    """That of the header ``X-Request-ID``, for the operator's log; null in the error of a job."""


class D2LoraError(Exception):
    """Root of the tree; see the drawing at the top of this file."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, errors: list[ProblemItem] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors or []

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.detail, self.errors)

    def within(self, field: str) -> "D2LoraError":
        """Return the same error, which says in which field of a request it lies."""
        return _rebuild(type(self), f"{field}: {self.detail}", self.errors)

    def problem(self, *, request_id: str | None = None) -> Problem:
        """Return the RFC 9457 object for this error."""
        return Problem(
            title=self.title,
            status=self.status,
            detail=self.detail,
            code=self.code,
            retryable=self.retryable,
            errors=self.errors,
            request_id=request_id,
        )


def _rebuild(cls: type[D2LoraError], detail: str, errors: list[ProblemItem]) -> D2LoraError:
    error = cls.__new__(cls)
    D2LoraError.__init__(error, detail, errors=errors)
    return error


class RequestInvalid(D2LoraError):
    code, status, title = "request_invalid", 422, "The request is not valid"


class ObjectiveUnavailable(RequestInvalid):
    code, title = "objective_unavailable", "The rows do not allow this objective"


class IdempotencyMismatch(RequestInvalid):
    code, title = "idempotency_mismatch", "The idempotency key was used with another request"


class Unauthorized(D2LoraError):
    code, status, title = "unauthorized", 401, "A valid API key is needed"


class NotFound(D2LoraError):
    code, status, title = "not_found", 404, "Not found"


class Conflict(D2LoraError):
    code, status, title = "conflict", 409, "The resource's state does not allow this"


class RequestTooLarge(D2LoraError):
    code, status, title = "request_too_large", 413, "The request is too large"


class DatasetInvalid(D2LoraError):
    """A dataset that cannot be used; ``row`` counts from 1, ``field`` is the column at fault."""

    code, status, title = "dataset_invalid", 422, "The dataset is not valid"

    def __init__(self, problem: str, *, row: int | None = None, field: str | None = None) -> None:
        place = "".join([f"row {row}: " if row is not None else "", f"field {field!r}: " if field is not None else ""])
        super().__init__(
            place + problem,
            errors=[ProblemItem(detail=problem, row=row, field=field)] if row is not None or field is not None else [],
        )


class DatasetEmpty(DatasetInvalid):
    code, title = "dataset_empty", "The dataset has no rows"


class DatasetEncodingInvalid(DatasetInvalid):
    code, title = "dataset_encoding_invalid", "The dataset is not UTF-8"


class DatasetSyntaxInvalid(DatasetInvalid):
    code, title = "dataset_syntax_invalid", "The dataset cannot be parsed"


class SchemaUnknown(DatasetInvalid):
    code, title = "schema_unknown", "The rows have no known set of columns"


class SchemaMixed(DatasetInvalid):
    code, title = "schema_mixed", "The rows are of more than one kind"


class CompletionEmpty(DatasetInvalid):
    code, title = "completion_empty", "A completion is empty"


class ChosenEqualsRejected(DatasetInvalid):
    code, title = "chosen_equals_rejected", "Chosen and rejected are equal"


class RowsTooLong(DatasetInvalid):
    code, title = "rows_too_long", "No row fits max_length"


class ModelError(D2LoraError):
    code, status, title = "model_error", 422, "The base model cannot be used"


class ModelNotFound(ModelError):
    code, title = "model_not_found", "The base model was not found"


class ModelNotAllowed(ModelError):
    code, title = "model_not_allowed", "The base model is not on this service's list"


class WeightsUnsafe(ModelError):
    code, title = "weights_unsafe", "The base model has only pickle weights"


class ModelUnsupported(ModelError):
    code, title = "model_unsupported", "The base model's architecture is not supported"


class TargetInvalid(ModelError):
    code, title = "target_invalid", "target_modules cannot be used"


class TargetsMissing(TargetInvalid):
    code, title = "targets_missing", "No module matches target_modules"


class TargetUnsupported(TargetInvalid):
    code, title = "target_unsupported", "A target module cannot carry LoRA correctly"


class RankTooLarge(TargetInvalid):
    code, title = "rank_too_large", "The rank is above a target's smaller side"


class ServiceUnreachable(D2LoraError):
    code, status, title, retryable = "service_unreachable", 503, "The service cannot be reached", True


class JobError(D2LoraError):
    code, title = "job_error", "The job failed"


class NumericalFailure(JobError):
    code, title = "numerical_failure", "A number is not finite"


class OutOfMemory(JobError):
    code, title = "out_of_memory", "A single row does not fit into memory"


class StorageFull(JobError):
    code, status, title = "storage_full", 507, "The storage is full"


class ScratchFull(StorageFull):
    code, title, retryable = "scratch_full", "The worker's disk is full", True


class StorageUnavailable(JobError):
    code, status, title, retryable = "storage_unavailable", 503, "The storage cannot be reached", True


class StoreUnavailable(JobError):
    code, status, title, retryable = "store_unavailable", 503, "The database cannot be reached", True


class BrokerUnavailable(JobError):
    code, status, title, retryable = "broker_unavailable", 503, "The broker cannot be reached", True


class ChecksumMismatch(JobError):
    code, title = "checksum_mismatch", "The bytes do not match their checksum"


class DeviceFailure(JobError):
    code, status, title, retryable = "device_failure", 503, "The accelerator failed", True


class FormatMismatch(JobError):
    code, status, title, retryable = "format_mismatch", 503, "Another version of the worker wrote this", True


class FormatOutdated(FormatMismatch):
    code, title = "format_outdated", "An older version wrote this file"


class StatisticsTooNew(JobError):
    code, status, title, retryable = "statistics_too_new", 503, "A newer version wrote these statistics", True


class ShardGone(JobError):
    code, title = "shard_gone", "A shard's file is gone"


class ModelUnavailable(JobError):
    code, status, title, retryable = "model_unavailable", 503, "The base model cannot be reached", True


class WorkerLost(JobError):
    code, title = "worker_lost", "The worker died too often on this job"


class InternalError(JobError):
    code, title = "internal_error", "An internal error"


class UnknownProblem(D2LoraError):
    """A problem of a code that this version does not know, such as a newer service's."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail, errors=problem.errors)
        self._problem = problem
        # On the instance, so that a script can still switch on the code.
        self.code, self.status, self.title = problem.code, problem.status, problem.title  # type: ignore[misc]  # of the class elsewhere

    def __reduce__(self) -> tuple[Any, ...]:
        return UnknownProblem, (self._problem,)


def from_problem(problem: Problem) -> D2LoraError:
    """Return the error that a problem was made from."""
    pending: list[type[D2LoraError]] = [D2LoraError]
    while pending:
        cls = pending.pop()
        if cls.code == problem.code:
            return _rebuild(cls, problem.detail, problem.errors)
        pending += cls.__subclasses__()
    return UnknownProblem(problem)
