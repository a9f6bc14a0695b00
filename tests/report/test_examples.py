"""The samples that a report shows are the ones whose decision changed."""

import torch

from tersor.report.examples import illustrate
from tersor.report.image import address, picture, png
from tersor.task import classification, text_classification


def flipped(*indices):
    examples = [{"index": i, "target": "0", "before": "0", "after": "1"} for i in indices]
    return {"comparison": {"flips": {"total": len(indices), "examples": examples}}}


def shown(report):
    return [e.get("input") for e in report["comparison"]["flips"]["examples"]]


def test_the_picture_of_each_flip_is_the_sample_of_that_number():
    images = torch.rand(25, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    task = classification(test=(images, torch.zeros(25, dtype=torch.long)), batch_size=10)
    report = illustrate(flipped(3, 12, 24), task)
    assert shown(report) == [
        {"image": address(png(picture(images[i].numpy())))} for i in (3, 12, 24)
    ]


def test_rows_of_numbers_are_shown_as_numbers():
    rows = torch.arange(40.0).reshape(4, 10)
    task = classification(test=(rows, torch.zeros(4, dtype=torch.long)))
    assert shown(illustrate(flipped(1), task)) == [{"text": "10, 11, 12, 13, 14, 15, 16, 17"}]


class Words:
    """A tokenizer of five words."""

    words = ("<pad>", "good", "bad", "film", "very")

    def __call__(self, text):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(self.words[i] for i in ids if i)


def test_texts_are_shown_as_texts_again():
    texts = ["good film", "very bad film", "film"]
    task = text_classification(test=(texts, [1, 0, 1]), tokenizer=Words())
    assert shown(illustrate(flipped(0, 1), task)) == [
        {"text": "good film"},
        {"text": "very bad film"},
    ]


def test_a_report_without_flips_stays_as_it_is():
    task = classification(test=(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)))
    assert illustrate({"comparison": {"flips": None}}, task) == {"comparison": {"flips": None}}
    assert illustrate({}, task) == {}
