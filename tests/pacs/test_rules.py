"""Rules: what a file may say, which rule fits, and what is said of one that cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from certificates import Certificates
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.pacs.dicomweb import Web
from cxr_retrieval.pacs.dimse import Peer
from cxr_retrieval.pacs.rules import Keep, Rules, read_rules, rules_of
from cxr_retrieval.radiograph.retained import Retain
from pacs.arriving import header

FULL = """
[node]
callers = ["CR_ROOM_1", "ARCHIVE"]
addresses = { CR_ROOM_1 = "10.0.0.7" }
associations = 4

[destinations.archive]
aet = "ARCHIVE"
host = "10.0.0.5"
port = 4242

[destinations.research]
web = "http://127.0.0.1:8042/dicom-web"
user = "cxr"
password_file = "secret"

[[rules]]
name = "emergency"
callers = ["CR_ROOM_1"]
modalities = ["DX", "CR"]
body_parts = ["CHEST"]
gallery = "https://milvus.hospital:19530"
where = "age >= 18"
top_k = 20
to = ["sender", "archive"]

[[rules]]
name = "rest"
forward = ["research"]
keep = "deidentified"
retain = ["patient_characteristics"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "rules.toml"
    path.write_text(text)
    return path


def test_a_file_says_who_may_send_and_what_is_done(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a password\n")
    rules = read_rules(written(tmp_path, FULL))
    assert rules.node.callers == ("CR_ROOM_1", "ARCHIVE")
    emergency, rest = rules.rules
    assert (emergency.where, emergency.top_k, emergency.keep, emergency.send) == ("age >= 18", 20, Keep.nothing, ("report", "picture"))
    assert (rest.keep, rest.retain) == (Keep.deidentified, {Retain.patient_characteristics})
    assert rules.destinations["archive"].opened() == Peer("ARCHIVE", "10.0.0.5", 4242)
    research = rules.destinations["research"].opened()
    assert isinstance(research, Web)
    assert (research.user, research.password) == ("cxr", "a password")


@pytest.mark.parametrize(
    ("caller", "elements", "fits"),
    [
        ("CR_ROOM_1", {}, "emergency"),
        ("CR_ROOM_1", {"Modality": "CR"}, "emergency"),
        ("CR_ROOM_1", {"Modality": "OT"}, "rest"),
        ("CR_ROOM_1", {"BodyPartExamined": "HAND"}, "rest"),
        ("CR_ROOM_1", {"BodyPartExamined": ""}, "rest"),
        ("ARCHIVE", {}, "rest"),
    ],
)
def test_the_first_rule_that_fits_counts(tmp_path: Path, caller: str, elements: dict[str, str], fits: str) -> None:
    rule = read_rules(written(tmp_path, FULL)).match(caller, header(**elements))
    assert rule is not None
    assert rule.name == fits


def test_there_may_be_no_rule_for_an_instance() -> None:
    rules = Rules.model_validate({"rules": [{"name": "one", "modalities": ["DX"]}]})
    assert rules.match("X", header(Modality="CR")) is None
    assert rules.named("one") is rules.rules[0]
    assert rules.named("another") is None


def test_the_sender_is_the_destination_with_its_ae_title(tmp_path: Path) -> None:
    rules = read_rules(written(tmp_path, FULL))
    assert rules.addressees(("sender", "archive"), "ARCHIVE") == ["archive"]
    assert rules.addressees(("sender", "archive"), "CR_ROOM_1") == ["archive"]
    assert rules.addressees(("sender",), "CR_ROOM_1") == []


def test_without_a_file_everything_is_answered_into_the_results() -> None:
    (rule,) = rules_of("deidentified").rules
    assert (rule.keep, rule.to) == (Keep.deidentified, ())
    with pytest.raises(UsageError, match="expected nothing or deidentified or received; got everything"):
        rules_of("everything")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[node", "cannot be read"),
        ("[node]\nport = 3", "node.port: Extra inputs are not permitted"),
        ('[node]\ncallers = ["A AE TITLE THAT IS TOO LONG"]', "an AE title is malformed"),
        ('[[rules]]\nname = "a"\nto = ["nowhere"]', 'names the destination "nowhere", and there is none'),
        ('[[rules]]\nname = "a"\n[[rules]]\nname = "a"', "two rules have the same name"),
        ('[[rules]]\nname = "a/b"', "rules.0.name"),
        ('[[rules]]\nname = "a"\nmodalities = ["dx"]', "rules.0.modalities.0"),
        ('[[rules]]\nname = "a"\nkeep = "all"', "'nothing', 'deidentified' or 'received'"),
        ('[[rules]]\nname = "a"\nretain = ["uids"]', 'retain without keep = "deidentified" or forward'),
        ('[destinations.sender]\nweb = "https://a/b"', 'is called "sender"'),
        ('[destinations.a]\nhost = "h"', "a DICOM peer needs host, port and aet"),
        ("[destinations.a]\n", "give either host, port and aet, or web"),
        (
            '[[rules]]\nname = "a"\nkeep = "deidentified"\nretain = ["longitudinal_full_dates", "longitudinal_modified_dates"]',
            "longitudinal",
        ),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read_rules(written(tmp_path, text))
    assert said in str(error.value)
    assert "rules.toml" in str(error.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_rules(tmp_path / "rules.toml")


def test_secrets_and_certificates_are_looked_for_beside_the_rules(tmp_path: Path, certificates: Certificates) -> None:
    ca = certificates.path("ours.pem")
    text = f'[destinations.a]\naet = "A"\nhost = "localhost"\nport = 104\nca = "{ca}"\n[[rules]]\nname = "all"'
    peer = read_rules(written(tmp_path, text)).destinations["a"].opened()
    assert isinstance(peer, Peer)
    assert peer.tls is not None
    destination = read_rules(written(tmp_path, '[destinations.a]\nweb = "https://a/b"\ntoken_file = "token"')).destinations["a"]
    with pytest.raises(SetupError, match=r"token: cannot be read"):
        destination.opened()
    (tmp_path / "token").write_text("\n")
    with pytest.raises(SetupError, match="token: empty"):
        destination.opened()
