"""What a deferred gate found, in a file beside the artifact, which itself never changes: `<folder>.gate.json`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ingot.ops.errors import IngotError

from .artifact import Artifact
from .files import ArtifactError, read, writing


class GateError(IngotError):
    """A kernel disagrees with its reference."""


class GateRecord(msgspec.Struct, frozen=True):
    """The verdict on every kernel of the artifact with this digest."""

    digest: str
    device: str
    errors: dict[str, float]  # of each kernel the largest, relative, over the calls that it is part of
    failed: dict[str, str]  # kernel → what it got wrong

    def write(self, artifact: Artifact) -> None:
        """Put the record beside the artifact. ArtifactError when nothing can be written there."""
        path = path_of(artifact.root)
        with writing(path):
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
            partial.replace(path)


def passed(device: str, error: float) -> str:
    """The verdict on a kernel that agrees with its reference."""
    return f"passed({device}, {error:.1e})"


DEFERRED = "deferred"


def path_of(folder: Path) -> Path:
    """Where the record of the artifact in a folder is, if there is one."""
    return folder.with_name(f"{folder.name}.gate.json")


def record_of(artifact: Artifact) -> GateRecord | None:
    """The record beside an artifact; None when there is none, or it is of other content. ArtifactError when it cannot be read."""
    path = path_of(artifact.root)
    if not path.exists():
        return None
    try:
        record = msgspec.json.decode(read(path), type=GateRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it, and run `ingot artifacts verify --gate {artifact.root}`") from error
    return record if record.digest == artifact.manifest.digest else None


def verdicts(artifact: Artifact) -> dict[str, str]:
    """Of each kernel "passed(device, error)", "failed(…)" or "deferred": as the compiler found, or a later gate."""
    record, compiled = record_of(artifact), artifact.manifest.report.get("gate", {})
    found = {k.name: compiled.get(k.name, DEFERRED) for k in artifact.manifest.kernels}
    if record is not None:
        found |= {k: f"failed({record.failed[k]})" if k in record.failed else passed(record.device, e) for k, e in record.errors.items()}
    return found


def refuse_failed(artifact: Artifact) -> None:
    """GateError when a gate found a kernel that computes something else than it should: such an artifact is not run."""
    failed = [f"{k}: {v}" for k, v in verdicts(artifact).items() if v.startswith("failed")]
    if failed:
        raise GateError(f"{artifact.root} has kernels that disagree with their references on this machine: {'; '.join(failed)}; "
                        "compile the model here, and please report this")  # fmt: skip


def notice(artifact: Artifact) -> str:
    """What to say of an artifact some of whose kernels no gate has seen; "" of others."""
    found = verdicts(artifact)
    deferred = sum(v == DEFERRED for v in found.values())
    if not deferred:
        return ""
    return f"{deferred} of {len(found)} kernels were never compared with their references; do it with: ingot artifacts verify --gate {artifact.root}"
