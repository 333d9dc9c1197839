"""Who may reach whom, as a cluster reads the network policies of deploy/kubernetes."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, field

from manifests import Object, of_kind, pods


@dataclass(frozen=True)
class Party:
    """Somebody who connects or is connected to: a pod, or an address elsewhere."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def ours(name: str, namespace: str = "cxr") -> Party:
    """A pod of ours, with the labels that its manifest gives it."""
    key = "app.kubernetes.io/name" if namespace == "cxr" else "cxr-retrieval/part"
    labels = next(pod.labels for pod in pods() if pod.labels.get(key) == name)
    return Party(labels, namespace, {"kubernetes.io/metadata.name": namespace})


def theirs(namespace: str, **labels: str) -> Party:
    """A pod in somebody else's namespace, which carries these of our labels."""
    return Party(
        {}, namespace, {"kubernetes.io/metadata.name": namespace, **{f"cxr-retrieval/{name}": value for name, value in labels.items()}}
    )


def fits(peer: Object, whose: str, party: Party) -> bool:
    """Whether a rule of a policy in the namespace `whose` means somebody."""
    if "ipBlock" in peer:
        return bool(party.address) and ipaddress.ip_address(party.address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if party.address:
        return False
    there = (
        party.namespace == whose
        if "namespaceSelector" not in peer
        else peer["namespaceSelector"].get("matchLabels", {}).items() <= party.namespace_labels.items()
    )
    return there and peer.get("podSelector", {}).get("matchLabels", {}).items() <= party.labels.items()


def lets(direction: str, of: Party, other: Party, port: int, protocol: str) -> bool:
    """Whether the policies of one side let it through; where none speaks of that side, everything passes."""
    if of.address:
        return True
    speaking = [
        one
        for one in {json.dumps(one, sort_keys=True): one for one in of_kind("NetworkPolicy")}.values()
        if one["metadata"]["namespace"] == of.namespace
        and one["spec"]["podSelector"].get("matchLabels", {}).items() <= of.labels.items()
        and direction in one["spec"]["policyTypes"]
    ]
    rules = [rule for one in speaking for rule in one["spec"].get(direction.lower(), ())]
    side = "from" if direction == "Ingress" else "to"
    return not speaking or any(
        any(fits(peer, of.namespace, other) for peer in rule[side])
        and ("ports" not in rule or any((one["port"], one["protocol"]) == (port, protocol) for one in rule["ports"]))
        for rule in rules
    )


def passes(source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether both sides let a connection through."""
    return lets("Egress", source, target, port, protocol) and lets("Ingress", target, source, port, protocol)
