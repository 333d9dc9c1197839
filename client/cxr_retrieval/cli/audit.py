"""`cxr audit`: checks the audit log, and shows what it holds."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, talk
from cxr_retrieval.errors import InputError

app = typer.Typer(help="Check, and read, the log of who did what to which cases.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(metavar="[FILE]", envvar="CXR_AUDIT", help="The log.")]


@app.command()
def verify(
    file: _File = options.AUDIT_DEFAULT,
    head: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="A head that an earlier check printed and you kept; it must still be in the log.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Check that no line was edited, taken out, put in, repeated or moved. Prints the head: keep it where who writes the log cannot.

    Without --head nobody can tell that lines were cut off the end, or that the whole file was written anew.
    """
    from cxr_retrieval.archive import audit

    found = audit.verify(file.expanduser(), head)
    if json:
        print_json({"lines": found.lines, "head": found.head, "torn": found.torn, "unfinished": found.unfinished, "flaw": found.flaw})
    elif found.flaw is None:
        typer.echo(f"{found.lines} lines, each follows the one above; head {found.head}")
    if found.torn:
        talk().print(f"{found.torn} lines half-written by a kill or a full disk; the line after each says so", soft_wrap=True)
    if found.unfinished:
        talk().print("the last line is half-written; the next one will say so", soft_wrap=True)
    if found.flaw is not None:
        raise InputError(
            f"{file}: {found.flaw}",
            expected="lines of which each follows the one above",
            got=f"{found.lines} that do, and then this one",
            next_step="keep the file as it is, and compare it with a copy",
        )


@app.command()
def show(
    file: _File = options.AUDIT_DEFAULT,
    case: Annotated[str | None, typer.Option(metavar="PSEUDONYM", help="Only lines that name this key or film.")] = None,
    action: Annotated[str | None, typer.Option(help="Only of this action, such as query or 'gallery remove'.")] = None,
    user: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only from this time (UTC) on, such as 2026-11-25T08.")] = None,
) -> None:
    """Print lines of the log, one JSON object each, as they stand there."""
    from cxr_retrieval.archive import audit

    for entry in audit.entries(file.expanduser()):
        if (
            (case is None or case in _named(entry))
            and action in (None, entry.get("action"))
            and user in (None, entry.get("user"))
            and (since is None or str(entry.get("time", "")) >= since)
        ):
            typer.echo(jsonlib.dumps(entry, ensure_ascii=False))


@app.command()
def pairs(
    out: Annotated[Path, typer.Option(metavar="CSV", help="Anchor, case, relevant (1 or 0), model version, time.")],
    file: _File = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Write what readers marked as training pairs: which cases are relevant to which films, and which are not.

    Of two marks on the same pair the later counts; one that was taken back is none. Pseudonyms alone stand there: `cxr gallery whois` leads
    those of stored cases back; film-… is the beginning of the SHA-256 of a film's file.
    """
    from cxr_retrieval.archive import audit
    from cxr_retrieval.archive.pairs import pairs as found_in
    from cxr_retrieval.archive.pairs import write_pairs

    log = file.expanduser()
    if flaw := audit.verify(log).flaw:
        raise InputError(
            f"{file}: {flaw}",
            expected="a log that holds together: nothing should be learnt from another",
            next_step="keep the file as it is, and compare it with a copy",
        )
    found = found_in(audit.entries(log))
    write_pairs(found, out)
    relevant = sum(pair.relevant for pair in found)
    if json:
        print_json({"pairs": len(found), "relevant": relevant, "file": str(out)})
    else:
        typer.echo(f"{out}: {len(found)} pairs, {relevant} of them relevant")


def _named(entry: dict[str, Any]) -> set[str]:
    """Every pseudonym in an entry, however deep."""
    found: set[str] = set()
    waiting: list[Any] = [entry]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found
