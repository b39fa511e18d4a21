"""Which claims still count: every write of a worker does while its claim's attempt is the newest (fencing)."""

from sqlalchemy.orm import Session

from d2lora.claims import Claim, ShardClaim
from d2lora.states import State
from d2lora.tables import InitializationRow, ShardRow
from d2lora.transitions import lock


def held(session: Session, claim: Claim) -> InitializationRow | None:
    """Return the claimed job, locked, unless a later attempt, a split or an end has taken it."""
    row = session.get(InitializationRow, claim.id, with_for_update=True)
    return row if is_held(row, claim) else None


def is_held(row: InitializationRow | None, claim: Claim) -> bool:
    """Return whether the claim of this job still counts."""
    return (
        row is not None
        and row.state in {State.RUNNING, State.CANCELLING}
        and row.attempt == claim.attempt
        and row.worker is not None
    )


def held_shard(session: Session, claim: ShardClaim) -> ShardRow | None:
    """Return the claimed shard, locked, unless a later attempt or its job's end has taken it."""
    job = session.get(InitializationRow, claim.id)
    shard = session.get(ShardRow, (claim.id, claim.number), with_for_update=True)
    return shard if is_shard_held(job, shard, claim) else None


def is_shard_held(job: InitializationRow | None, shard: ShardRow | None, claim: ShardClaim) -> bool:
    """Return whether the claim of this job's shard still counts."""
    if job is None or shard is None or job.state != State.RUNNING:
        return False
    useful = shard.kind == "statistics" or shard.made_by == job.attempt
    return useful and is_of(shard, claim) and shard.worker is not None


def is_of(shard: ShardRow, claim: ShardClaim) -> bool:
    """Return whether the claim is of the shard's last attempt; both numbers begin anew when a job is cut anew."""
    return (shard.made_by, shard.attempt) == (claim.made_by, claim.attempt)


def job_held_by(session: Session, claim: Claim | ShardClaim) -> InitializationRow | None:
    """Return the job, locked, if this claim of it or of its shard still counts."""
    if isinstance(claim, Claim):
        return held(session, claim)
    row = lock(session, claim.id)
    return row if held_shard(session, claim) is not None else None


def shard_of(session: Session, claim: ShardClaim) -> ShardRow:
    """Return the shard, which is there as long as the claim counts."""
    return session.get_one(ShardRow, (claim.id, claim.number))
