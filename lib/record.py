"""predictions.json: what each file in a folder of predictions was made from. What a file is, its content says.

{"version": 1, "job": ID, "pending": [names], "jobs": {ID: job}, "files": {name: [entry, ...]}}: a job is what all its
predictions share; `job` is the one that wrote last, and `pending` what it still has to overwrite. An entry is {"job":
ID, "input": {"path", "size", "sha256"}, "sha256": ...}; while a file is replaced there are two, of which one has its
sum. This module needs no torch, as evaluation does not.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib.system.error import InputError
from lib.system.files import digest, file_digest, joint_digest, read_text, write_json

NAME = "predictions.json"
VERSION = 1  # of the file
UNSAID = {"step_size": 0.5}  # what a job without the key was done with
MEND = "give --overwrite or another --output"


@dataclass
class Record:
    """What predictions.json of `folder` says, of the files that are still there."""

    folder: Path
    job: str | None = None  # None: there is no predictions.json
    pending: set[str] = field(default_factory=set)
    jobs: dict[str, dict] = field(default_factory=dict)
    files: dict[str, list[dict]] = field(default_factory=dict)

    def entry(self, name: str) -> dict | None:
        """What the file was made from; None where it is not what was written under this name."""
        sum_ = file_digest(self.folder / name)
        return next((entry for entry in reversed(self.files.get(name, [])) if entry["sha256"] == sum_), None)

    def begin(self, job: dict, overwritten: Iterable[str] = ()) -> None:
        """From now on files are of this job, which is to replace the `overwritten` ones."""
        now = identity(job)
        self.pending = {*overwritten} | (self.pending if self.job == now else set())
        self.job = now
        self.jobs[now] = job

    def announce(self, name: str, source: dict, sha256: str) -> None:
        """Note that a file is about to be replaced by one with this sum, made from the input `source`."""
        self.files[name] = [*self.files.get(name, []), {"job": self.job, "input": source, "sha256": sha256}]
        self.write()

    def replaced(self, name: str) -> None:
        """The file that was announced is there; the next `write` says so."""
        self.files[name] = self.files[name][-1:]
        self.pending.discard(name)

    def write(self) -> None:
        used = {entry["job"] for entries in self.files.values() for entry in entries}
        content = {
            "version": VERSION,
            "job": self.job,
            "pending": sorted(self.pending),
            "jobs": {key: job for key, job in sorted(self.jobs.items()) if key in used},
            "files": dict(sorted(self.files.items())),
        }
        write_json(self.folder / NAME, content)


def read_record(folder: Path) -> Record:
    """The record of a folder, without what is no longer there; an empty one where there is none.

    Raises InputError if it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return Record(folder)
    try:
        content = json.loads(read_text(path))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        _check(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); restore or delete it, then give --overwrite") from error
    files = {name: entries for name, entries in content["files"].items() if (folder / name).is_file()}
    record = Record(folder, content["job"], set(content["pending"]), content["jobs"], files)
    for name, entries in files.items():
        if len(entries) > 1 and (entry := record.entry(name)):  # a process was killed between two steps
            files[name] = [entry]
    return record


def _check(content: dict) -> None:
    """Raise one of the errors of wrong types unless all that is used later is what `Record.write` writes."""
    jobs = content["jobs"]
    texts = [content["job"], *content["pending"]]
    for job in jobs.values():
        texts += [one[key] for one in (job["model"], *_models(job)) for key in ("path", "sha256")]
    for name, entries in content["files"].items():
        if Path(name).name != name or not isinstance(entries, list) or not entries:
            raise ValueError(f"{name}: {entries!r}")
        for entry in entries:
            texts += [entry["sha256"], entry["input"]["path"], entry["input"]["sha256"], jobs[entry["job"]] and ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a number where text belongs")


def _models(job: dict) -> list[dict]:
    """The files of the models of a job: of several each has its own entry."""
    return job["model"].get("models", [job["model"]])


def identity(job: dict) -> str:
    """What tells a job from others; where its model lies does not."""
    return digest(json.dumps(job | {"model": job["model"]["sha256"]}, sort_keys=True).encode())[:16]


def difference(there: dict, job: dict) -> str:
    """How an earlier job differs from `job`, in the words of the flags."""
    model, source = there["model"], job["model"]
    words = []
    if model["sha256"] != source["sha256"]:
        before, now = ([one["path"] for one in _models(a_job)] for a_job in (there, job))
        which = "another one of this name" if before == now else " ".join(before)
        words.append(f"the model{' was' if len(before) == 1 else 's were'} {which}")
    flags = {key: f"--{key}" for key in ("data", "patch_size", "amp", "step_size")} | {"tta": "--no_tta"}
    for key in sorted({*there, *job} - {"model"}):
        before, now = (a_job.get(key, UNSAID.get(key)) for a_job in (there, job))
        if before == now:
            continue
        if key in ("tta", "amp"):
            words.append(f"{flags[key]} was {'' if before == (key == 'amp') else 'not '}given")
        elif key == "postprocessing" and not (before and now):
            words.append(f"--no_postprocessing was {'not ' if before else ''}given")
        elif key in flags:
            words.append(f"{flags[key]} was {' '.join(map(str, before)) if isinstance(before, list) else before}")
        else:
            words.append(f"the {key} was another one")
    return ", ".join(words)


def check_others(record: Record, job: dict) -> None:
    """Raise InputError if a folder holds predictions of another job, or of none that is known, and the last one there
    was not this job either."""
    now = identity(job)
    others = {entry["job"] for entries in record.files.values() for entry in entries} - {now}
    if others and record.job != now:
        other = record.jobs[record.job if record.job in others else min(others)]
        raise InputError(f"{record.folder}: holds other predictions ({difference(other, job)}); {MEND}")
    if record.job is None and (record.folder / "model.json").exists() and any(record.folder.glob("[!.]*.nii.gz")):
        raise InputError(f"{record.folder}: holds predictions, but no {NAME} says what they were made from; {MEND}")


def is_done(record: Record, job: dict, source: Sequence[Path], outputs: Iterable[Path]) -> bool:
    """Whether the outputs of an image are there, made by this job from this image (one file for each channel); not if
    it has to overwrite them. Those that are there are pending no more.

    Raises InputError if one is there that was made from anything else, or changed since.
    """
    now, there = identity(job), [output for output in outputs if output.exists()]
    done = there == [*outputs]
    for output in there:
        entry = record.entry(output.name)
        if entry and entry["job"] == now and _is_same(entry["input"], source):
            record.pending.discard(output.name)
            continue
        if record.job == now and output.name in record.pending:
            done = False
        elif entry is None:
            raise InputError(f"{output}: is not as it was predicted, or comes from elsewhere; {MEND}")
        elif entry["job"] != now:
            raise InputError(f"{output}: is another prediction ({difference(record.jobs[entry['job']], job)}); {MEND}")
        else:
            raise InputError(f"{source[0]}: is not the image that {output} was predicted from; {MEND}")
    return done


def _is_same(described: dict, source: Sequence[Path]) -> bool:
    now = source_identity(*source)
    return (described["size"], described["sha256"]) == (now["size"], now["sha256"])


def as_source(path: Path, n_bytes: int, sha256: str) -> dict:
    """How the record describes a file of this size and SHA-256."""
    return {"path": str(path.resolve()), "size": n_bytes, "sha256": sha256}


def source_identity(path: Path, *others: Path) -> dict:
    """What says which file this is: its size and SHA-256, and its path for people. Of an image of several files: the
    path of the first, and size and `joint_digest` of all. Raises InputError."""
    try:
        files = path, *others
        return as_source(path, sum(file.stat().st_size for file in files), joint_digest(map(file_digest, files)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({str(error.strerror).lower()}); give another file") from error


def joint_source(sources: Sequence[dict]) -> dict:
    """What says which files some models, each {"path", "sha256"}, are: of several the path of the first, the
    `joint_digest`, and each for itself."""
    if len(sources) == 1:
        return sources[0]
    joint = joint_digest(source["sha256"] for source in sources)
    return {"path": sources[0]["path"], "sha256": joint, "models": list(sources)}


@contextmanager
def identified(path: Path) -> Iterator[dict]:
    """The `source_identity` of a file that is read meanwhile. Raises InputError if it changes."""
    before = source_identity(path)
    yield before
    if source_identity(path) != before:
        raise InputError(f"{path}: changed while it was read; start again")


def foreign_files(folder: Path, names: Iterable[str]) -> list[str]:
    """A line for the screen if some of the predictions `names` are not as the record of the folder says: edited since,
    or from elsewhere. Raises InputError if the record is damaged."""
    record = read_record(folder)
    others = [name for name in names if name in record.files and record.entry(name) is None]
    return [f"not as they were predicted, but edited or from elsewhere: {', '.join(others)}"] if others else []


def mixed_jobs(folder: Path, names: Iterable[str]) -> str | None:
    """Why the predictions `names` (of files) in a folder are not those of one job, nor model.json its model; else None.

    Files that predictions.json does not know, and folders without it, are not judged. Raises InputError if it is
    damaged.
    """
    record, found = read_record(folder), {}
    for name in names:
        if name in record.files and (entry := record.entry(name)):
            found.setdefault(entry["job"], name)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        what = difference(record.jobs[one], record.jobs[other])
        return f"{first} and {second} were not made alike (of the former: {what})"
    try:
        model = json.loads(read_text(folder / "model.json"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if any(record.jobs[job]["model"]["sha256"] != model for job in found):
        return "model.json describes another model than that of the predictions"
    return None
