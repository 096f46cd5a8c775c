"""The network policies of cluster/kuberay, by the rules of Kubernetes: they allow only what is needed."""

from __future__ import annotations

from typing import Any

from manifests import PODS, of


def _peers(rule: dict[str, Any], side: str) -> list[dict[str, Any]]:
    assert rule.get(side), "a rule without peers allows everybody"
    return rule[side]


def _allowed(sender: dict[str, str], receiver: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod of the namespace with these labels reach this port of another one."""

    def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        return selector.get("matchLabels", {}).items() <= labels.items()

    def passes(side: str, kind: str, own: dict[str, str], other: dict[str, str]) -> bool:
        applying = [d["spec"] for d in of("NetworkPolicy")]
        applying = [s for s in applying if kind in s["policyTypes"] and matches(s["podSelector"], own)]
        assert applying, "nothing denies by default"
        return any(
            any("namespaceSelector" not in peer and matches(peer["podSelector"], other) for peer in _peers(rule, side))
            and ("ports" not in rule or port in {entry["port"] for entry in rule["ports"]})
            for spec in applying
            for rule in spec.get(kind.lower(), [])
        )

    return passes("to", "Egress", sender, receiver) and passes("from", "Ingress", receiver, sender)


def test_only_what_is_needed_is_allowed():
    [everything] = [
        d["spec"] for d in of("NetworkPolicy") if d["spec"]["podSelector"] == {} and "egress" not in d["spec"]
    ]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    pods = {owner: labels for owner, labels, _ in PODS} | {"stranger": {"app": "stranger"}}
    ports = (5000, 5432, 6379, 8265, 8333, 10001, 40000)
    seen = {
        (sender, receiver, port)
        for sender in pods
        for receiver in pods
        for port in ports
        if _allowed(pods[sender], pods[receiver], port)
    }
    needed = {("ray", "ray", port) for port in ports}
    needed |= {("ray", "mlflow", 5000), ("mlflow-user", "mlflow", 5000)}
    needed |= {("mlflow", "postgres", 5432), ("mlflow", "object-store", 8333)}
    assert seen == needed


def test_only_kuberay_and_the_name_service_are_allowed_outside_the_namespace():
    outside = []
    for document in of("NetworkPolicy"):
        for side, kind in (("from", "ingress"), ("to", "egress")):
            for rule in document["spec"].get(kind, []):
                for peer in _peers(rule, side):
                    assert "ipBlock" not in peer
                    if "namespaceSelector" in peer:
                        [namespace] = peer["namespaceSelector"]["matchLabels"].values()
                        assert peer["podSelector"]["matchLabels"]
                        outside.append((document["metadata"]["name"], namespace, {p["port"] for p in rule["ports"]}))
    assert outside == [("names", "kube-system", {53}), ("ray", "kuberay-operator", {8265})]
