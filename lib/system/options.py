"""Options of a command as the fields of a frozen dataclass: flags, --help and the JSON form follow from the fields."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from lib.system.cli import Parser
from lib.system.error import InputError

CHOSEN = object()  # a default that another setting chooses, see Options.chosen


def setting(
    group: str,
    text: str,
    default: object = CHOSEN,
    *,
    shown: str = "",
    resume: str = "keeps",
    flag: str = "",
    **argument: Any,
) -> Any:
    """A field with a flag, which --help shows in `group` with this `text`.

    default: a value, `CHOSEN`, or a function of the values of the other settings. shown: the default in the words of
    --help, where the value does not say it; {chosen} there stands for what may be chosen. resume: what a run that is
    continued does: it "keeps" its own value, "changes" it to what is given, or has only "started" by it, and what is
    given has another meaning. flag: where it is not --name. argument: the rest of what argparse must know; with
    action="store_true" it is a switch.
    """
    known = {"group": group, "text": text, "default": default, "shown": shown, "resume": resume, "flag": flag}
    return field(metadata=known | {"argument": argument})


def noted(default: object = None) -> Any:
    """A field without a flag: `default` is a function of the other settings, or None for what is found out later."""
    return field(metadata={"group": None, "default": default, "resume": "keeps"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """A subclass has the fields, each made by `setting` or `noted`."""

    parser_texts: ClassVar[dict[str, str]] = {}  # prog, description, epilog

    @classmethod
    def chosen(cls, name: str, values: Mapping[str, Any]) -> object:
        """The default of a setting that is `CHOSEN`, given the values of others."""
        raise NotImplementedError

    @classmethod
    def chosen_text(cls, name: str) -> str:
        """What may be chosen, for --help."""
        raise NotImplementedError

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """What is given, else the defaults; None counts as not given. Names that are no settings are passed over."""
        values = {f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None}
        missing = [f for f in fields(cls) if f.name not in values]
        for f in sorted(missing, key=lambda f: callable(f.metadata["default"])):  # functions need the other values
            default = f.metadata["default"]
            value = cls.chosen(f.name, values) if default is CHOSEN else default
            values[f.name] = value(values) if callable(value) else value
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    @classmethod
    def default(cls, name: str) -> object:
        """The default of a setting that depends on no other."""
        return next(f.metadata["default"] for f in fields(cls) if f.name == name)

    @classmethod
    def parser(cls) -> Parser:
        """The flags. What is not given is None: `of` fills it in."""
        parser, groups = Parser(**cls.parser_texts), {}
        for f in _flagged(cls):
            group = f.metadata["group"]
            groups[group] = groups.get(group) or parser.add_argument_group(group)
            text = f"{f.metadata['text']} (default: {cls._default_text(f)})".replace("%", "%%")
            groups[group].add_argument(flag_of(f), dest=f.name, default=None, help=text, **f.metadata["argument"])
        return parser

    @classmethod
    def _default_text(cls, f: Field) -> str:
        default = f.metadata["default"]
        shown = f.metadata["shown"] or (
            "{chosen}" if default is CHOSEN else "none" if default is None else str(default)
        )
        return shown.replace("{chosen}", cls.chosen_text(f.name)) if "{chosen}" in shown else shown

    @classmethod
    def flags(cls, values: Mapping[str, Any]) -> list[str]:
        """The command line that gives these values. Raises InputError where one holds a null character."""
        argv: list[str] = []
        for f in (f for f in _flagged(cls) if values.get(f.name) is not None):
            value, switch = values[f.name], "action" in f.metadata["argument"]
            words = [*map(str, value)] if isinstance(value, list | tuple) else [str(value)]
            if switch:
                argv += [flag_of(f)] * (value is not False)
            elif len(words) == 1 and words[0].startswith("-"):
                argv.append(f"{flag_of(f)}={words[0]}")
            else:
                argv += [flag_of(f), *words]
        if any("\0" in word for word in argv):
            raise InputError("a setting holds a null character")
        return argv

    def as_dict(self) -> dict[str, Any]:
        """The values as JSON has them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def continued(self, given: Mapping[str, Any], run: object) -> Self:
        """The settings of `run` as it goes on: its own, but for what may change. Raises InputError where others are
        given."""
        changed = {}
        for f in (f for f in fields(self) if f.metadata["resume"] != "started" and given.get(f.name) is not None):
            value, own = given[f.name], getattr(self, f.name)
            value = tuple(value) if isinstance(value, list) else value
            if f.metadata["resume"] == "changes":
                changed[f.name] = value
            elif value != own:
                raise InputError(
                    f"{flag_of(f)} {value}: the run {run} has {own}; leave the flag out, or start a new run"
                )
        return replace(self, **changed)


def _flagged(kind: type[Options]) -> list[Field]:
    return [f for f in fields(kind) if f.metadata["group"]]


def flag_of(f: Field) -> str:
    return f.metadata["flag"] or f"--{f.name}"
