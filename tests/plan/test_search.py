"""The search for a file of a given size."""

from types import SimpleNamespace

from tersor.plan import search
from tersor.plan.trial import Point


def test_a_miss_by_a_few_bytes_is_not_tried_again(monkeypatch):
    # The dear choice takes 900 bytes, the file 110 more, 10 too many. Ten bytes less for the
    # weights still leave room for the dear choice; only less than 900 lead to the cheap one.
    study = SimpleNamespace(
        options=lambda: [[(900, 0.0), (500, 1.0)]],
        sites=[SimpleNamespace(name="weight")],
        choices=[[SimpleNamespace(label="dear"), SimpleNamespace(label="cheap")]],
        sizes=[[900, 500]],
        size_before=2000,
    )
    tried = []

    def propose(bench, payload):
        tried.append(payload)
        size, loss, label = (900, 0.0, "dear") if payload >= 900 else (500, 1.0, "cheap")
        return Point([], size + 110, loss, {"weight": label})

    monkeypatch.setattr(search, "propose", propose)
    limit = 1000 + search._MARGIN
    assert search.fit(SimpleNamespace(study=study), limit).bytes == 610
    assert tried[:2] == [1000, 890]
