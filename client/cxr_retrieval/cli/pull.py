"""`cxr pull`: reads its options, calls the library, prints."""

from __future__ import annotations

import importlib.util
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json, talk
from cxr_retrieval.cli.watched import Watched
from cxr_retrieval.errors import InputError, SetupError, UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import Tls

if TYPE_CHECKING:
    from cxr_retrieval.pacs.pulling import Archive

_WHICH: Final = "Which films"
_ARCHIVE: Final = "The archive"
_LOCKED: Final = "Encryption and credentials"
_SHOWN: Final = 20
_LISTED: Final = 1000


@options.with_servers
def pull(
    seen: Watched,
    out: Annotated[Path, typer.Option(help="Folder for the films; its journal, by which an interrupted run goes on, lies in it.")],
    web: Annotated[
        str, typer.Option(metavar="URL", envvar="CXR_PULL_WEB", help="Root of its DICOMweb services.", rich_help_panel=_ARCHIVE)
    ] = "",
    peer: Annotated[
        str, typer.Option(metavar="AET@HOST:PORT", envvar="CXR_PULL_PEER", help="Or where it speaks DIMSE.", rich_help_panel=_ARCHIVE)
    ] = "",
    calling: Annotated[
        str, typer.Option(metavar="AET", envvar="CXR_PULL_CALLING", help="Our AE title, as it knows us.", rich_help_panel=_ARCHIVE)
    ] = "CXR",
    get: Annotated[bool, typer.Option("--get", help="Fetch by C-GET: no port of ours is needed.", rich_help_panel=_ARCHIVE)] = False,
    move_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Fetch by C-MOVE: it sends to this port of ours, under --calling.", rich_help_panel=_ARCHIVE),
    ] = None,
    timeout: Annotated[float, typer.Option(envvar="CXR_TIMEOUT", help="Deadline of one answer, seconds.", rich_help_panel=_ARCHIVE)] = 30.0,
    workers: Annotated[int, typer.Option(min=1, max=32, help="Films fetched at a time.", rich_help_panel=_ARCHIVE)] = 4,
    modality: Annotated[str, typer.Option(metavar="LIST", help="Of these, with commas between.", rich_help_panel=_WHICH)] = "CR,DX",
    body_part: Annotated[str, typer.Option(metavar="PART", help="Such as CHEST.", rich_help_panel=_WHICH)] = "",
    since: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Studies from this day on.", rich_help_panel=_WHICH)] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="And up to this one.", rich_help_panel=_WHICH)] = None,
    description: Annotated[
        str, typer.Option(metavar="WORDS", help="Words in the study's description, one behind the other.", rich_help_panel=_WHICH)
    ] = "",
    patient: Annotated[str, typer.Option(metavar="ID", help="Of this patient alone.", rich_help_panel=_WHICH)] = "",
    prior_to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="From the days before this DICOM film, of its patient, whose ID is sent to the archive and nowhere else.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many films in the folder.", rich_help_panel=_WHICH)] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again for what failed in an earlier run.")] = False,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt --peer; trust public authorities.", show_default=False, rich_help_panel=_LOCKED)
    ] = False,
    ca: Annotated[
        Path | None, typer.Option(envvar="CXR_PULL_CA", help="Encrypt, trusting these authorities (PEM).", rich_help_panel=_LOCKED)
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(envvar="CXR_PULL_CERT", help="Encrypt, and show this certificate (PEM).", rich_help_panel=_LOCKED)
    ] = None,
    key: Annotated[Path | None, typer.Option(envvar="CXR_PULL_KEY", help="Private key of --cert.", rich_help_panel=_LOCKED)] = None,
    server_name: Annotated[
        str, typer.Option(envvar="CXR_PULL_SERVER_NAME", help="Name in its certificate, if another.", rich_help_panel=_LOCKED)
    ] = "",
    user: Annotated[str, typer.Option(envvar="CXR_PULL_USER", help="For --web, with a password.", rich_help_panel=_LOCKED)] = "",
    password_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_PULL_PASSWORD_FILE", help="File with the password; or CXR_PULL_PASSWORD holds it.", rich_help_panel=_LOCKED
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_PULL_TOKEN_FILE", help="File with a bearer token for --web; or CXR_PULL_TOKEN holds it.", rich_help_panel=_LOCKED
        ),
    ] = None,
    plain_http: Annotated[
        bool,
        typer.Option(
            "--plain-http", help="Let identities cross the network unencrypted, for an archive without https.", rich_help_panel=_LOCKED
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Fetch films from an archive into a folder. Kill it, lose the archive: the same command fetches the rest, and nothing twice."""
    if importlib.util.find_spec("pynetdicom") is None or importlib.util.find_spec("dicomweb_client") is None:
        raise SetupError(
            "archives cannot be spoken to", expected="the extra dicom", got="none", next_step="pip install 'cxr-retrieval[dicom]'"
        )
    from cxr_retrieval.pacs.pulled import THERE, Pulled
    from cxr_retrieval.pacs.pulling import pull as run_pull
    from cxr_retrieval.pacs.searching import Wanted
    from cxr_retrieval.pacs.searching import prior_to as prior
    from cxr_retrieval.radiograph.decoding import FilmReader

    if bool(web) == bool(peer):
        raise UsageError("where from", expected="one of --web and --peer", got="both" if web else "neither", next_step="give one")
    encrypted = Tls(ca, cert, key, server_name) if tls or ca or cert or key or server_name else None
    modalities = tuple(word.strip().upper() for word in modality.split(","))
    wanted = Wanted(modalities, body_part.upper(), since and since.date(), until and until.date(), description, patient)
    started = time.monotonic()
    with ExitStack() as opened, until_interrupted() as stop:
        reader = opened.enter_context(FilmReader())
        from cxr_retrieval.archive.patience import Patience
        from cxr_retrieval.pacs import archives

        if prior_to is not None:
            if patient:
                raise UsageError("--prior-to with --patient", expected="one of them", next_step="leave one out")
            wanted = prior(reader.header(prior_to).result(), wanted)
        archive: Archive
        if web:
            secrets = options.secret(password_file, "CXR_PULL_PASSWORD"), options.secret(token_file, "CXR_PULL_TOKEN")
            archive = opened.enter_context(archives.on_the_web(web, encrypted, user, *secrets, timeout, plain_http, workers))
        else:
            archive = opened.enter_context(archives.by_dimse(peer, encrypted, timeout, calling, get=get, move_port=move_port))
        pulled = opened.enter_context(Pulled(out, {"archive": web or peer, "limit": limit, **wanted.of_journal()}))
        if retry_failed:
            pulled.retry_failed()
        before = pulled.counts()
        with seen.bar("pulling") as bar:

            def found(count: int, all_found: bool) -> None:
                if all_found:
                    seen.tell(f"{count} films found")
                    bar.describe("pulling", to_go=pulled.counts()["pending"])
                else:
                    bar.describe(f"pulling; {count} films found so far")

            complete, size = run_pull(
                archive,
                wanted,
                pulled,
                reader,
                Patience(stop, patience, seen.tell, seen.watch),
                workers=workers,
                limit=limit,
                advance=bar.advance,
                found=found,
            )
        seconds, counts = time.monotonic() - started, pulled.counts()
        new = counts[THERE] - before[THERE]
        summary: dict[str, Any] = {
            "found": sum(counts.values()),
            "pulled": new,
            "already_there": before[THERE],
            "failed": counts["failed"],
            "pending": counts["pending"],
            "bytes": size,
            "seconds": round(seconds, 1),
            "per_second": round(new / seconds, 2),
            "folder": str(out),
            "failures": [{"instance": uid, "reason": reason} for uid, reason in pulled.failures(_LISTED)],
        }
    _report(summary, seen, complete=complete, json=json)


def _report(summary: dict[str, Any], seen: Watched, *, complete: bool, json: bool) -> None:
    if json:
        print_json(summary)
    else:
        for failure in summary["failures"][:_SHOWN] if seen.speaks else ():
            talk().print(Text.assemble(("failed", "red"), f" {failure['instance']}: {failure['reason']}"), soft_wrap=True)
        typer.echo(
            f"{summary['found']} films found: {summary['pulled']} pulled, {summary['already_there']} already there, "
            f"{summary['failed']} failed; {summary['bytes'] / 1e6:.1f} MB, {summary['seconds']} s, {summary['per_second']} a second; "
            f"{summary['folder']}"
        )
    if not complete:
        seen.tell("interrupted; what was fetched is kept. Next: give the same command again, it goes on from here")
        raise typer.Exit(INTERRUPTED)
    if summary["failed"]:
        raise InputError(f"{summary['failed']} films could not be had", next_step="see the reasons; --retry-failed asks for them again")
