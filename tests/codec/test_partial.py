"""Files read from where they are: some rows, over a network, through a pipe, on any threads."""

import http.server
import io
import os
import threading
import time

import pytest
import torch
from torch import nn

from tersor.codec import Http, Ranges, chunks, load, read_header, read_tensor, save, shelf, verify
from tersor.errors import FileError, OptionError
from tersor.forms import (
    Affine,
    Bitmask,
    BitPlanes,
    BlockFloat,
    Codebook,
    Dense,
    NofM,
    ProductCodebook,
    Trellis,
)
from tersor.surgery import hold

WEIGHT = torch.randn(12, 8, 3, generator=torch.Generator().manual_seed(1))
SPARSE = WEIGHT * (torch.arange(8) % 4 < 2)[:, None]


def scaled(weight, axis):
    """A codebook whose output channels have scales."""
    form = Codebook.encode(weight, torch.linspace(-1, 1, 12))
    scale = (torch.arange(weight.shape[axis])[:, None] + 1).bfloat16()
    return Codebook(form.codes, form.values, scale, bits=4, dtype=weight.dtype, axis=axis)


def in_pairs(weight, axis):
    """Codes of five sub-vectors of five inputs; the last of a row is cut short."""
    outputs = weight.shape[axis]
    codes = torch.arange(outputs * -(-weight.numel() // outputs // 5)).byte() % 5
    values = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    return ProductCodebook(
        codes.reshape(outputs, -1), values, axis=axis, shape=weight.shape, dtype=weight.dtype
    )


FORMS = {
    "plain": lambda w: None,
    "affine": lambda w: Affine.encode(w, bits=4),
    "affine groups": lambda w: Affine.encode(w, bits=3, group_size=5, symmetric=False),
    "affine tensor": lambda w: Affine.encode(w, bits=4, axis=None, symmetric=False),
    "affine groups in one row": lambda w: Affine.encode(w, bits=4, axis=None, group_size=7),
    "affine axis": lambda w: Affine.encode(w, bits=8, axis=1),
    "planes": lambda w: BitPlanes.encode(w, group_size=7),
    "nvfp4": BlockFloat.encode,
    "mxfp4": lambda w: BlockFloat.encode(w, format="mxfp4"),
    "mxfp4 axis": lambda w: BlockFloat.encode(w, format="mxfp4", axis=1),
    "codebook": lambda w: Codebook.encode(w, torch.linspace(-1, 1, 12)),
    "codebook scales": lambda w: scaled(w, 0),
    "codebook scales axis": lambda w: scaled(w, 1),
    "product codebook": lambda w: in_pairs(w, 0),
    "product codebook axis": lambda w: in_pairs(w, 1),
    "dense": lambda w: Dense.encode(w, dtype=torch.bfloat16),
    "dense scales": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e5m2),
    "dense scales axis": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e4m3fn, axis=1),
    "dense scale": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e4m3fn, axis=None),
    "bitmask": lambda w: Bitmask.encode(w.relu()),
    "nofm": lambda w: NofM.encode(w.relu() * (torch.arange(8) % 4 < 2)[:, None], n=6, m=12),
    "trellis": lambda w: Trellis.encode(w, step=0.1, states=8),
    "trellis steps": lambda w: Trellis.encode(w, step=torch.rand(12) + 0.1, states=4),
    "trellis row": lambda w: Trellis.encode(w, step=0.1, axis=None),
    "trellis along a row": lambda w: Trellis.encode(w, step=0.1, axis=None, states=8),
}


def network(form):
    net = nn.Sequential(nn.Conv1d(8, 12, 3), nn.Conv1d(12, 4, 1))
    net[0].weight.data.copy_(WEIGHT)
    if form(WEIGHT) is not None:
        hold(net[0], "weight", form(WEIGHT))
    return net


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_those_of_the_whole(tmp_path, name):
    net = network(FORMS[name])
    path = save(net, tmp_path / "net.tersor")
    whole = net[0].weight.detach()
    assert torch.equal(read_tensor(path, "0.weight"), whole)
    for rows in (slice(3, 7), slice(5), slice(-1, None), slice(0, 12), slice(4, 4), slice(9, 2)):
        assert torch.equal(read_tensor(path, "0.weight", rows), whole[rows])


@pytest.mark.parametrize("rows", [slice(0, 8, 2), 3, "all", slice(1.5, 3)])
def test_rows_are_a_slice(tmp_path, rows):
    path = save(nn.Linear(3, 2), tmp_path / "net.tersor")
    with pytest.raises(OptionError, match=r"rows=.* of shape \(2, 3\); give slice\(start, stop\)"):
        read_tensor(path, "weight", rows)
    with pytest.raises(
        OptionError, match=r"there is no tensor 'w'; there are \['bias', 'weight'\]"
    ):
        read_tensor(path, "w")


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file whose weight lies in 6 chunks of 2 rows, between other tensors."""
    monkeypatch.setattr("tersor.codec.shelf.TOGETHER", 100)
    monkeypatch.setattr("tersor.codec.shelf.CHUNK", dict.fromkeys(shelf.CHUNK, 48))
    monkeypatch.setattr(chunks, "_ALONE", 0)
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(24, 12), nn.Linear(6, 6))
    for layer, bits in zip(net, (8, 4, 3), strict=True):
        hold(layer, "weight", Affine.encode(layer.weight, bits=bits))
    path = save(net, tmp_path / "net.tersor", example=None)
    assert max(len(run.lengths) for run in read_header(path).runs) == 6
    return net, path


def test_only_the_chunks_of_the_rows_are_read(large):
    net, path = large
    content, asked = path.read_bytes(), []

    def read_range(offset, length):
        asked.append((offset, length))
        return content[offset : offset + length]

    source = Ranges(read_range, len(content))
    assert torch.equal(read_tensor(source, "1.weight", slice(4, 7)), net[1].weight[4:7])
    header = read_header(path)
    run = next(i for i, run in enumerate(header.runs) if len(run.lengths) == 6)
    own = [chunk for chunk in header.chunks if chunk.run == run]
    assert (header.chunks_at + own[2].offset, own[2].length + own[3].length) in asked
    read = sum(length for offset, length in asked if offset >= header.chunks_at)
    assert read < sum(chunk.length for chunk in header.chunks) / 2


def test_damage_elsewhere_does_not_matter_to_some_rows(large):
    net, path = large
    header, content = read_header(path), bytearray(path.read_bytes())
    run = next(i for i, run in enumerate(header.runs) if len(run.lengths) == 6)
    fourth = [chunk for chunk in header.chunks if chunk.run == run][3]
    content[header.chunks_at + fourth.offset] ^= 1
    path.write_bytes(content)
    assert torch.equal(read_tensor(path, "1.weight", slice(0, 6)), net[1].weight[:6])
    with pytest.raises(FileError, match="the checksum of chunk"):
        read_tensor(path, "1.weight", slice(6, 7))


def test_any_number_of_threads_gives_the_same(large, monkeypatch):
    net, path = large
    monkeypatch.setattr(chunks, "_IN_FLIGHT", 100)
    for threads in (1, 2, 3, 16):
        for batch in (1, 2**20):
            monkeypatch.setattr(chunks, "_BATCH", batch)
            again = load(
                path, into=nn.Sequential(*(nn.Linear(n, m) for n, m in SIZES)), threads=threads
            )
            assert all(torch.equal(a.weight, b.weight) for a, b in zip(net, again, strict=True))


SIZES = ((5, 5), (24, 12), (6, 6))


def test_a_damaged_chunk_is_found_on_any_thread(large):
    _, path = large
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for threads in (1, 4):
        with pytest.raises(FileError, match="the checksum of chunk"):
            load(path, threads=threads)


@pytest.mark.parametrize("threads", [0, -1, 1.5, None])
def test_threads_are_counted(large, threads):
    with pytest.raises(OptionError, match=r"threads=.*; give a whole number >= 1"):
        load(large[1], threads=threads)


def test_a_mapped_file_is_read_like_any_other(large, monkeypatch):
    net, path = large
    monkeypatch.setattr("tersor.codec.source._MAPPED", 0)
    assert torch.equal(read_tensor(path, "1.weight"), net[1].weight)
    assert verify(path) == read_header(path)
    path.write_bytes(b"")
    with pytest.raises(FileError, match=r"is not a \.tersor file"):
        load(path)


def test_open_files_and_pipes_are_read_in_one_pass(large):
    net, path = large
    content = path.read_bytes()
    with path.open("rb") as file:
        assert torch.equal(read_tensor(file, "2.weight"), net[2].weight)
        # From the start on, wherever the last reader left it.
        assert verify(file) == read_header(path)
    assert verify(io.BytesIO(content)) == read_header(path)
    out, into = os.pipe()
    with open(out, "rb", buffering=0) as reader, open(into, "wb") as writer:
        thread = threading.Thread(target=lambda: (writer.write(content + b"next"), writer.close()))
        thread.start()
        assert verify(reader) == read_header(path)
        # What follows the file belongs to whoever reads the pipe on.
        assert reader.read() == b"next"
        thread.join()


class Slow(io.RawIOBase):
    """A stream that gives one byte at a time and cannot go back."""

    def __init__(self, content):
        self._rest = io.BytesIO(content)

    def read(self, size=-1):
        return self._rest.read(min(size, 1))


def test_a_stream_may_give_few_bytes_at_a_time_and_must_give_all(large):
    _, path = large
    content = path.read_bytes()
    assert verify(Slow(content)) == read_header(path)
    for length in (0, 7, 30, 70, len(content) - 1):
        with pytest.raises(FileError, match="the given Slow"):
            load(Slow(content[:length]))


class Text:
    """A stream of text that is not one of Python's own."""

    def read(self, size=-1):
        return "text"


def test_what_cannot_be_read_is_refused(tmp_path):
    for place in (5, None, b"content", object()):
        with pytest.raises(OptionError, match="is no file; give a path, a file opened with"):
            load(place)
    with pytest.raises(OptionError, match=r"the given StringIO is open as text; open it for"):
        load(io.StringIO("content"))
    (tmp_path / "a.tersor").write_bytes(b"\x89TERSOR\n" + bytes(90))
    with (
        open(tmp_path / "a.tersor") as file,
        pytest.raises(OptionError, match=r"a\.tersor is open as text; .* open\(path, 'rb'\)"),
    ):
        load(file)
    with pytest.raises(OptionError, match="the given Text is open as text"):
        load(Text())
    with pytest.raises(FileError, match="2 bytes came where 56 were asked for"):
        load(Ranges(lambda offset, length: b"ab", 1000))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, in ranges or not, and remembers what was asked for."""

    content, ranges, asked = b"", True, []
    # What goes wrong, and from which byte of the file on.
    harm, harmed_from = "", 0

    def do_GET(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.asked.append((first, last))
        if self.harm and first >= self.harmed_from:
            self.fail()
            return
        if self.path != "/net.tersor":
            self.send_error(404)
            return
        part = self.content[first : last + 1] if self.ranges else self.content
        self.send_response(206 if self.ranges else 200)
        if self.ranges:
            end = first + len(part) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(self.content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def fail(self):
        self.close_connection = True
        if self.harm == "another language":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        elif self.harm == "no answer":
            time.sleep(0.5)
        elif self.harm in ("half an answer", "huge numbers"):
            self.send_response(206)
            last = "9" * 5000 if self.harm == "huge numbers" else "63"
            self.send_header("Content-Range", f"bytes 0-{last}/1000")
            self.send_header("Content-Length", "64")
            self.end_headers()
            self.wfile.write(b"half")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(large):
    """The address of a folder that has the file."""
    Handler.content, Handler.ranges, Handler.asked = large[1].read_bytes(), True, []
    Handler.harm, Handler.harmed_from = "", 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_web_server_is_asked_for_what_is_needed(large, server, monkeypatch):
    monkeypatch.setattr("tersor.codec.remote._FIRST", 64)
    net, path = large
    file = Http(f"{server}/net.tersor")
    assert torch.equal(read_tensor(file, "1.weight", slice(4, 6)), net[1].weight[4:6])
    # The preamble, the rest of the header, scales, one chunk of codes.
    assert len(Handler.asked) == 4
    assert read_header(file) == read_header(path)
    loaded = load(file, into=nn.Sequential(*(nn.Linear(n, m) for n, m in SIZES)))
    assert torch.equal(loaded[2].weight, net[2].weight)


def test_a_small_file_takes_one_request(server):
    verify(Http(f"{server}/net.tersor"))
    assert len(Handler.asked) == 1


def test_servers_that_do_not_serve_are_named(server):
    with pytest.raises(FileError, match=r"/other: it cannot be read: .*404.*; check the address"):
        Http(f"{server}/other")
    Handler.ranges = False
    with pytest.raises(FileError, match="the server sends no ranges; download the file"):
        Http(f"{server}/net.tersor")
    with pytest.raises(OptionError, match="is no web address"):
        Http("file:///etc/passwd")


@pytest.mark.parametrize(
    "harm", ["hangs up", "another language", "no answer", "half an answer", "huge numbers"]
)
def test_a_server_that_fails_is_named_once(server, monkeypatch, harm):
    monkeypatch.setattr("tersor.codec.remote._FIRST", 64)
    url = f"{server}/net.tersor"
    file = Http(url, timeout=0.2)
    says = r"^http.*: (it cannot be read: .+; check the|the server sent another range .*; download)"
    for harmed_from, read in ((1, lambda: load(file)), (0, lambda: Http(url, timeout=0.2))):
        Handler.harm, Handler.harmed_from = harm, harmed_from
        with pytest.raises(FileError, match=says) as found:
            read()
        assert str(found.value).count(url) == 1
        assert str(found.value).isprintable()


@pytest.mark.parametrize("url", ["http://a b/", "http://[", "http://127.0.0.1:1/ü", "http://"])
def test_an_address_that_cannot_be_asked_is_named(url):
    with pytest.raises(FileError, match=r"^http://.*: it cannot be read: .+; check the address"):
        Http(url)


def test_an_address_is_text_and_waiting_ends():
    with pytest.raises(OptionError, match="5 is no web address"):
        Http(5)
    for timeout in (0, -1, float("nan"), "1", None):
        with pytest.raises(OptionError, match=r"timeout=.*; give seconds above 0"):
            Http("http://127.0.0.1:1/", timeout=timeout)


def test_a_server_that_sends_another_range_is_refused(server, monkeypatch):
    monkeypatch.setattr("tersor.codec.remote._FIRST", 64)
    file = Http(f"{server}/net.tersor")
    Handler.content = Handler.content[:70]
    with pytest.raises(FileError, match=r"net\.tersor"):
        verify(file)
