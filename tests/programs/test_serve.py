"""examples/serve.py as a program: many requests at once, and those that it refuses."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT, python_path

from slide_torch import LSHLinear

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from examples import serve

REQUESTS, N, D, K = 1000, 3000, 16, 5


@contextlib.contextmanager
def server_of(path):
    """The port of a server of the predictor at ``path``."""
    command = [sys.executable, "-u", ROOT / "examples" / "serve.py", path, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=python_path())
    try:
        lines = iter(process.stderr.readline, "")
        said = ""
        port = None
        while port is None:
            line = next(lines, None)
            assert line is not None, said
            said += line
            port = re.search(r"running on http://127\.0\.0\.1:(\d+)", line)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or a full pipe stops it
        yield int(port[1])
    finally:
        process.kill()
        process.wait()


def ask(port, query):
    """Status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/topk", query, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_thousand_requests_at_once(tmp_path):
    layer, x = LSHLinear(D, N), torch.randn(REQUESTS, D)
    layer.calibrate(x[:200], K, 0.9)
    path = tmp_path / "predictor.pt"
    torch.save(layer.predictor().state_dict(), path)
    answers = [None] * REQUESTS
    start = threading.Barrier(REQUESTS)
    with server_of(path) as port:

        def request(i):
            query = json.dumps({"inputs": x[i : i + 1].tolist()})
            start.wait()
            answers[i] = ask(port, query)

        threads = [threading.Thread(target=request, args=(i,)) for i in range(REQUESTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        status, several = ask(port, json.dumps({"inputs": x[:3].tolist()}))
        wrong = {
            json.dumps({"inputs": [[1.0] * (D + 1)]}): f"last dimension {D}",
            json.dumps({"inputs": [[1.0] * D, [1.0]]}): "expected sequence of length",
            json.dumps({"inputs": [["a"] * D]}): "valid number",
            json.dumps({"inputs": [[float("nan")] * D]}): "expected finite numbers",
            json.dumps({"inputs": [[1e300] * D]}): "expected finite numbers",
            json.dumps({"inputs": []}): f"last dimension {D}",
            "[]": "valid dictionary",
            "{": "JSON",
        }
        refused = {query: ask(port, query) for query in wrong}
        again, _ = ask(port, json.dumps({"inputs": x[:1].tolist()}))  # it goes on
    for i, (code, found) in enumerate(answers):
        expected = layer.predict(x[i : i + 1], K, exact=False)
        assert code == 200
        assert torch.equal(torch.tensor(found["values"]), expected.values), i
        assert torch.equal(torch.tensor(found["indices"]), expected.indices), i
    assert status == again == 200
    assert several["indices"] == layer.predict(x[:3], K, exact=False).indices.tolist()
    for query, (code, answer) in refused.items():
        assert code == 422 and wrong[query] in json.dumps(answer), (query, code, answer)


@pytest.mark.parametrize("what", ["no file", "a layer", "no archive"])
def test_files_that_are_none_of_a_predictor(what, tmp_path, monkeypatch, capsys):
    path = tmp_path / "predictor.pt"
    if what == "a layer":
        torch.save(LSHLinear(D, N).state_dict(), path)
    if what == "no archive":
        path.write_text("nothing")
    monkeypatch.setattr(sys, "argv", ["serve.py", str(path)])
    with pytest.raises(SystemExit) as end:
        serve.main()
    assert end.value.code == 2 and "serve.py: error: " in capsys.readouterr().err
