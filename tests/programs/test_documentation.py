"""README and docs: Python blocks run, links and anchors lead somewhere, named files and programs are there.

The blocks of a page share a namespace and run in order. ``SETUP`` makes what a page takes for granted (a
loader, a model, inputs); ``SMALLER`` shrinks layers, so that all of it runs in seconds. Below a comment
``<!-- test: needs NAME, ... -->`` a block runs where these modules are installed.
"""

import contextlib
import gc
import importlib.util
import re
import sys
from urllib.parse import unquote

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

import slide_torch
from benchmarks.readme import update

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
) + sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"(?:^<!-- test: (.*?) -->\n)?^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE
)
SMALLER = {
    "670_091": "2_000",
    "100_000": "1_000",
    "60_000": "1_000",
    "50_000": "500",
    "65_536": "512",
    "16_384": "256",
    "fullgraph=True": "fullgraph=True, backend='aot_eager'",  # Inductor would compile for minutes
}

IMPORTS = """
import torch
import torch.nn.functional as F
from torch import nn
import slide_torch
from helpers import ROOT
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions, convert_
from slide_torch.optim import Adam
"""
LOADER = """
loader = [(torch.randn(32, 300), torch.randint(1000, (32,))) for _ in range(2)]
"""
SWAP = """
x, y = torch.randn(32, 128), torch.randint(1000, (32,))
"""
SETUP = {
    "README.md": IMPORTS + LOADER + SWAP,
    "docs/index.md": IMPORTS + SWAP,
    "docs/quickstart.md": "import torch" + LOADER,
    "docs/choosing.md": IMPORTS
    + """
validation_inputs = torch.randn(64, 128)
loader = [(torch.randn(32, 128), torch.randint(1000, (32,))) for _ in range(3)]
optimizer = Adam(LSHLinear(128, 10).parameters())
""",
    "docs/prediction.md": IMPORTS
    + """
layer = LSHLinear(16, 1000)
x, validation_inputs = torch.randn(4, 16), torch.randn(64, 16)
""",
    "docs/training.md": "tokens = __import__('torch').randint(1000, (5000,))",
    "docs/hidden.md": IMPORTS + "x = torch.randn(8, 512)",
    "docs/sampling.md": IMPORTS
    + """
vocabulary = 10_000
tokens = torch.randint(vocabulary, (20_000,))
""",
    "docs/distributed.md": """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(300, 128), nn.Identity()

    def forward(self, x):
        return self.head(self.body(x))

model = Model()
"""
    + LOADER,
    "docs/pytorch.md": IMPORTS
    + """
path = "checkpoint.pt"
data = torch.utils.data.TensorDataset(torch.randn(64, 300), torch.randint(1000, (64,)))
loader = torch.utils.data.DataLoader(data, batch_size=32)
model = nn.Sequential(nn.Linear(16, 8), LSHLinear(8, 500, sparse=True))
optimizer = Adam(model.parameters())
x, y = torch.randn(4, 16), torch.randint(500, (4,))
F.cross_entropy(model(x), y).backward()
optimizer.step()
try:
    from transformers import GPT2Config
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    tokens = torch.randint(300, (8, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
except ImportError:
    pass
""",
}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    """(line, modules it needs, code) of every Python block of a page."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        note, code = found.groups()
        assert note is None or note.startswith("needs "), f"{name_of(page)}: unknown note: {note}"
        needs = re.findall(r"\w+", note.removeprefix("needs ")) if note else []
        yield text[: found.start(2)].count("\n") + 1, needs, code


@contextlib.contextmanager
def process_group(tmp_path):
    """One of this process alone, for the blocks that reduce gradients."""
    rendezvous = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    gc.collect()  # a DistributedDataParallel that outlives its group may hang
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page))], ids=name_of)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    parallel = "DistributedDataParallel(" in page.read_text()
    with process_group(tmp_path) if parallel else contextlib.nullcontext():
        namespace = {"__name__": "documentation"}
        exec(SETUP[name_of(page)], namespace)
        for line, needs, code in blocks_of(page):
            if not all(importlib.util.find_spec(module) for module in needs):
                continue
            for large, small in SMALLER.items():
                code = code.replace(large, small)
            # tracebacks then name the line of the page
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        torch._dynamo.reset()  # its guards refer to the namespace
        namespace.clear()


def test_the_usage_of_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert max(code.count("\n") for _, _, code in blocks_of(ROOT / "README.md")) <= 20


# --- links ------------------------------------------------------------------------------------------


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def included(page):
    """A page's text, with the files that the site includes in it."""
    return re.sub(
        r'^--8<-- "(.*?)"$',
        lambda match: (ROOT / match[1]).read_text(),
        page.read_text(),
        flags=re.MULTILINE,
    )


def anchors_of(page):
    text = re.sub(r"```.*?```", "", included(page), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)}: {link}: no such file"
        if page.is_relative_to(ROOT / "docs"):  # the site has nothing else
            assert target.resolve().is_relative_to(ROOT / "docs"), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{name_of(page)}: {link}: no such heading"


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert navigation == {
        page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    """What is named with its folder: a file that moves takes the text with it."""
    folders = "benchmarks|csrc|docs|examples|slide_torch|tests"
    for path in re.findall(
        rf"\b(?:{folders})/[\w/.-]*\.(?:py|md|json|cpp|h|txt)\b", page.read_text()
    ):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path}: no such file"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=name_of)
def test_named_programs_exist(page):
    text = page.read_text()
    programs = re.findall(r"python -m ((?:benchmarks|examples)[\w.]+\w)", text)
    # a table whose head is the first part of the command
    programs += [
        f"benchmarks.{name}"
        for name in re.findall(r"^\| `((?:accuracy|hidden|speed)\.\w+)` \|", text, re.M)
    ]
    for program in programs:
        path = ROOT / f"{program.replace('.', '/')}.py"
        assert path.exists(), f"{name_of(page)}: {program}: no such program"


def test_the_api_reference_has_every_public_name():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    described = set(re.findall(r"^::: slide_torch\.(\w+)", text, re.MULTILINE))
    assert described == {*slide_torch.__all__, "data", "distributed", "integrations"}


def test_tables_are_those_of_the_records(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["update", "--check"])
    update.main()
