"""The page's HTTP interface. Answers are JSON unless said otherwise; every request that is no GET carries the header `X-CXR-View`.

    GET  /                                the page; its parts lie below /assets/
    GET  /api/status                      what answers: model_version, gallery {name, cases}, top_k, words (whether text finds cases),
                                          disclaimer
    POST /api/session                     Authorization: Bearer <token> → a cookie, where the page has a token
    POST /api/films                       body: one DICOM, PNG, JPEG or TIFF, as it is → {film: "film-…"}
    POST /api/queries                     {film, top_k?, where?, text?, patient?, include_own?, gate?, error_rate?, balance?,
                                           source?}
                                          → an answer
    GET  /api/queries/{id}                an answer that was given before
    POST /api/queries/{id}/marks          {marks: [{key, relevant}, …]}, all that hold → the same question moved by them, an answer
    POST /api/queries/{id}/balance        {balance}: 0…1 → the same question, its marks included, so weighed, an answer
    GET  /api/queries/{id}/page           the answer as one HTML file
    GET  /api/films/{film}/greys          the film's own values: uint16, little-endian, row by row; the header X-CXR-Film says the rest,
                                          {width, height, intercept, slope, low, high, inverted, shrunk} (`radiograph.greys.Greys`)
    GET  /api/films/{film}/thumbnail      PNG, at most 256 pixels high and wide
    GET  /api/films/{film}/explanation    PNG that lies over the film when stretched to it: red is attention (0…255 for 0…1), green lungs
    POST /api/cases                       {where?, text?, limit?, offset?} → {cases: […]} of the gallery; a clause may name a patient, and
                                          so is in no address
    POST /api/alike                       {text, where?, limit?} → {cases: [{…, similarity}], shares} whose films are like a text; in no
                                          address either
    POST /api/clause                      {where?, text?, typed?, at?} → what a filter says, and what may be written next
                                          (`ReadingRoom.clause`)
    GET  /api/map                         the gallery at a glance, how far it is (`MapRoom.state`); the map has an id, which changes with it
    POST /api/map                         {anew?} → {}: try again after a failure, or compute it anew
    GET  /api/map/{map}/points            x and y of each case, in [−1, 1]: float32, little-endian
    GET  /api/map/{map}/colours?field=    a byte for each case, in the same order; the header X-CXR-Legend says what they mean,
                                          {kind, ends, entries: [{name, low, high, cases, voted, agree}]} (`Coloured`)
    GET  /api/map/{map}/queries/{id}      where an answer's film and its neighbours lie: {query: [x, y], neighbours: [{rank, x, y}]}
    POST /api/map/{map}/cases             {corners: [[x, y], …], limit?, offset?} → {total, cases, summary, told} of a region
    GET  /api/worklist?list=&sort=&descending=&limit=&offset=
                                          {lists, rows, total, whole}: `recent` queries, or lines of results files (0, 1, …)
    GET  /api/collections                 {collections: [{id, name, made, pins}, …]}
    POST /api/collections                 {name} → the new one
    GET  /api/collections/{id}            the same with what it holds (`Shelf.one`)
    POST /api/collections/{id}            {name}: its new name
    DELETE /api/collections/{id}
    POST /api/collections/{id}/pins       {film, note?} a stored case, or {answer, note?} an answer's film with what the vote said
    DELETE /api/collections/{id}/pins/{film}
    GET  /api/collections/{id}/table      CSV: pseudonyms, facts, notes

An answer is the published form of a query result and what `ReadingRoom.ask` adds. Films are named `film-…`, `case-…`, `line-…`.

What cannot be done is {error: {kind, what, expected, got, next_step, message, may_pass}}: 401 without the token, 403 from another site, 404
for what is no longer here, 413 too large, 422 for a film or a question that is unusable, 503 for a server that cannot serve it now.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from cxr_retrieval.errors import CxrError, GoneError, ImageError, InputError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE
from cxr_retrieval.retrieval.voting import DEFAULT_K
from cxr_retrieval.serving.access import Access
from cxr_retrieval.view.access import Door
from cxr_retrieval.view.marks import parsed
from cxr_retrieval.view.room import Question, ReadingRoom

ASSETS: Final = Path(__file__).with_name("assets")
_JSON_BYTES: Final = 64 * 1024

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


def application(room: ReadingRoom, access: Access, names: Collection[str], port: int, most_bytes: int) -> Starlette:
    """The whole of it. `most_bytes`: of one file that is dropped; other arguments as of `Door`."""

    async def status(request: Request) -> Response:
        return JSONResponse({**await run_in_threadpool(room.status), "most_bytes": most_bytes})

    async def films(request: Request) -> Response:
        data = await _body(request, most_bytes)
        if data is None:
            most = f"at most {most_bytes // 2**20} MiB"
            return problem(ImageError("the file is too large", expected=most, next_step="choose a single radiograph"), 413)
        return JSONResponse({"film": await run_in_threadpool(room.keep, data)}, 201)

    async def queries(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(room.ask, _question(await _body(request, _JSON_BYTES))))

    async def answer(request: Request) -> Response:
        return JSONResponse(room.answer(request.path_params["number"]))

    async def greys(request: Request) -> Response:
        found = await run_in_threadpool(room.greys, request.path_params["film"])
        height, width = found.stored.shape
        about: dict[str, Any] = {"width": width, "height": height, "intercept": found.intercept, "slope": found.slope}
        about |= {"low": found.low, "high": found.high, "inverted": found.inverted, "shrunk": found.shrunk}
        return _octets(found.stored.astype("<u2").tobytes(), {"x-cxr-film": json.dumps(about)})

    async def thumbnail(request: Request) -> Response:
        return _png(await run_in_threadpool(room.thumbnail, request.path_params["film"]))

    async def explanation(request: Request) -> Response:
        return _png(await run_in_threadpool(room.explanation, request.path_params["film"]))

    async def cases(request: Request) -> Response:
        given = _given(await _body(request, _JSON_BYTES))
        where, text = _typed(given, "where", ""), _typed(given, "text", "")
        limit, offset = _typed(given, "limit", 60), _typed(given, "offset", 0)
        return JSONResponse({"cases": await run_in_threadpool(room.cases, where, text, limit, offset)})

    async def alike(request: Request) -> Response:
        given = _given(await _body(request, _JSON_BYTES))
        text, where, limit = _typed(given, "text", ""), _typed(given, "where", ""), _typed(given, "limit", 60)
        return JSONResponse(await run_in_threadpool(room.alike, text, where, limit))

    async def clause(request: Request) -> Response:
        given = _given(await _body(request, _JSON_BYTES))
        where, text, typed = (_typed(given, name, "") for name in ("where", "text", "typed"))
        return JSONResponse(await run_in_threadpool(room.clause, where, text, typed, _typed(given, "at", len(typed))))

    async def map_state(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(room.map.state))

    async def map_again(request: Request) -> Response:
        room.map.again(anew=_typed(_given(await _body(request, _JSON_BYTES)), "anew", default=False))
        return JSONResponse({}, 202)

    async def points(request: Request) -> Response:
        return _octets(room.map.sheet(request.path_params["map"]).points.tobytes())

    async def colours(request: Request) -> Response:
        field = request.query_params.get("field", "label")
        found = await run_in_threadpool(room.map.sheet(request.path_params["map"]).coloured, field)
        about = {"kind": found.kind, "ends": found.ends, "entries": [asdict(entry) for entry in found.entries]}
        return _octets(found.codes.tobytes(), {"x-cxr-legend": json.dumps(about)})

    async def map_marks(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(room.marked, request.path_params["map"], request.path_params["number"]))

    async def brushed(request: Request) -> Response:
        given = _given(await _body(request, _JSON_BYTES))
        limit, offset = _typed(given, "limit", 60), _typed(given, "offset", 0)
        return JSONResponse(await run_in_threadpool(room.brushed, request.path_params["map"], _corners(given), limit, offset))

    async def worklist(request: Request) -> Response:
        asked = request.query_params

        def page() -> dict[str, Any]:
            return room.worklist(
                asked.get("list", "recent"),
                asked.get("sort", "order"),
                descending=asked.get("descending", "") == "1",
                offset=_number(asked.get("offset"), 0),
                limit=_number(asked.get("limit"), 50),
            )

        return JSONResponse(await run_in_threadpool(page))

    async def balance(request: Request) -> Response:
        given = _typed(_given(await _body(request, _JSON_BYTES)), "balance", DEFAULT_BALANCE)
        return JSONResponse(await run_in_threadpool(room.turn, request.path_params["number"], given))

    async def marks(request: Request) -> Response:
        given = parsed(_typed(_given(await _body(request, _JSON_BYTES)), "marks", list[Any]()))
        return JSONResponse(await run_in_threadpool(room.mark, request.path_params["number"], given))

    async def saved(request: Request) -> Response:
        number = request.path_params["number"]
        return _attached(await run_in_threadpool(room.page, number), f"answer-{number}.html", "text/html")

    async def collections(request: Request) -> Response:
        if request.method == "POST":
            name = _typed(_given(await _body(request, _JSON_BYTES)), "name", "")
            return JSONResponse(await run_in_threadpool(room.shelf.create, name), 201)
        return JSONResponse({"collections": await run_in_threadpool(room.shelf.all)})

    async def collection(request: Request) -> Response:
        number = request.path_params["number"]
        if request.method == "POST":
            name = _typed(_given(await _body(request, _JSON_BYTES)), "name", "")
            return JSONResponse(await run_in_threadpool(room.shelf.rename, number, name))
        if request.method == "DELETE":
            await run_in_threadpool(room.shelf.remove, number)
            return Response(status_code=204)
        return JSONResponse(await run_in_threadpool(room.shelf.one, number))

    async def pins(request: Request) -> Response:
        given = _given(await _body(request, _JSON_BYTES))
        film, note, asked = _typed(given, "film", ""), _typed(given, "note", ""), _typed(given, "answer", 0)
        shown = room.answer(asked) if asked else None
        if shown is not None:
            film = shown["film"] if shown["film"].startswith("case-") else shown["image_id"]
        told = None if shown is None else {**shown["prediction"], **shown}
        await run_in_threadpool(room.shelf.pin, request.path_params["number"], film, note, told)
        return Response(status_code=204)

    async def pin(request: Request) -> Response:
        await run_in_threadpool(room.shelf.unpin, request.path_params["number"], request.path_params["film"])
        return Response(status_code=204)

    async def table(request: Request) -> Response:
        number = request.path_params["number"]
        return _attached(await run_in_threadpool(room.shelf.table, number), f"collection-{number}.csv", "text/csv")

    async def page(request: Request) -> Response:
        return FileResponse(ASSETS / "index.html")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/status", _safely(status)),
            Route("/api/films", _safely(films), methods=["POST"]),
            Route("/api/queries", _safely(queries), methods=["POST"]),
            Route("/api/queries/{number:int}", _safely(answer)),
            Route("/api/films/{film}/greys", _safely(greys)),
            Route("/api/films/{film}/thumbnail", _safely(thumbnail)),
            Route("/api/films/{film}/explanation", _safely(explanation)),
            Route("/api/cases", _safely(cases), methods=["POST"]),
            Route("/api/alike", _safely(alike), methods=["POST"]),
            Route("/api/clause", _safely(clause), methods=["POST"]),
            Route("/api/map", _safely(map_state)),
            Route("/api/map", _safely(map_again), methods=["POST"]),
            Route("/api/map/{map:int}/points", _safely(points)),
            Route("/api/map/{map:int}/colours", _safely(colours)),
            Route("/api/map/{map:int}/queries/{number:int}", _safely(map_marks)),
            Route("/api/map/{map:int}/cases", _safely(brushed), methods=["POST"]),
            Route("/api/worklist", _safely(worklist)),
            Route("/api/queries/{number:int}/balance", _safely(balance), methods=["POST"]),
            Route("/api/queries/{number:int}/marks", _safely(marks), methods=["POST"]),
            Route("/api/queries/{number:int}/page", _safely(saved)),
            Route("/api/collections", _safely(collections), methods=["GET", "POST"]),
            Route("/api/collections/{number:int}", _safely(collection), methods=["GET", "POST", "DELETE"]),
            Route("/api/collections/{number:int}/pins", _safely(pins), methods=["POST"]),
            Route("/api/collections/{number:int}/pins/{film}", _safely(pin), methods=["DELETE"]),
            Route("/api/collections/{number:int}/table", _safely(table)),
            Mount("/assets", StaticFiles(directory=ASSETS)),
        ],
        middleware=[Middleware(Door, access=access, names=names, port=port)],
        exception_handlers={HTTPException: _nothing_here},
    )


def problem(error: CxrError, status: int | None = None) -> JSONResponse:
    """An error of ours, in its parts."""
    parts = {"what": error.what, "expected": error.expected, "got": error.got, "next_step": error.next_step}
    kind = type(error).__name__
    if status is None:
        status = 404 if isinstance(error, GoneError) else 422 if isinstance(error, InputError) else 503
    return JSONResponse({"error": {"kind": kind, **parts, "message": str(error), "may_pass": error.may_pass}}, status)


def _safely(endpoint: Endpoint) -> Endpoint:
    """Whatever goes wrong becomes an answer. Of what should never happen stderr gets kind and place: a message may name a patient."""

    async def safe(request: Request) -> Response:
        try:
            return await endpoint(request)
        except CxrError as error:
            return problem(error)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            sys.stderr.write(f"unexpected: {type(error).__name__} at {place}\n")
            what = CxrError("the page's server met something unexpected", got=f"{type(error).__name__} at {place}", next_step="report it")
            return problem(what, 500)

    return safe


async def _nothing_here(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if request.url.path.startswith("/api/"):
        return problem(UsageError("there is nothing here", next_step="reload the page"), status)
    return FileResponse(ASSETS / "missing.html", status)


async def _body(request: Request, most: int) -> bytes | None:
    """All of it; None if that is more than `most` bytes, of which no more are then taken in."""
    if int(request.headers.get("content-length") or 0) > most:
        return None
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)


def _question(body: bytes | None) -> Question:
    given = _given(body)
    return Question(
        _typed(given, "film", ""),
        _typed(given, "top_k", DEFAULT_K),
        _typed(given, "where", ""),
        _typed(given, "text", ""),
        _typed(given, "patient", "") or None,
        _typed(given, "include_own", default=False),
        _typed(given, "gate", default=True),
        _typed(given, "error_rate", DEFAULT_ERROR_RATE),
        _typed(given, "balance", DEFAULT_BALANCE),
        _typed(given, "source", "") or None,
    )


def _given(body: bytes | None) -> dict[str, Any]:
    """The JSON object that was sent."""
    try:
        given: Any = json.loads(body or b"")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise _malformed("a JSON object")
    return given


def _typed(given: dict[str, Any], name: str, default: T) -> T:
    """A value of just the default's type (to Python a bool is an int, too; to JSON 1 is 1.0), or the default where there is none."""
    value = given.get(name)
    if value is None:
        return default
    if type(value) not in ((int, float) if type(default) is float else (type(default),)):
        raise _malformed(f"{name} as {type(default).__name__}")
    return value


def _malformed(expected: str) -> UsageError:
    return UsageError("the question is malformed", expected=expected, next_step="reload the page")


def _number(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError("a number is malformed", expected="digits", next_step="reload the page")
    return int(text)


def _corners(given: dict[str, Any]) -> list[list[float]]:
    corners = _typed(given, "corners", list[Any]())
    for corner in corners:
        if not (isinstance(corner, list) and len(corner) == 2 and all(type(part) in (int, float) and abs(part) <= 1e6 for part in corner)):
            raise _malformed("corners as pairs of numbers")
    return corners


def _octets(data: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(data, media_type="application/octet-stream", headers=headers)


def _attached(text: str, name: str, kind: str) -> Response:
    """A file to be saved."""
    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


def _png(picture: bytes) -> Response:
    return Response(picture, media_type="image/png")
