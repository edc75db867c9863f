"""Serves a saved Predictor over HTTP: the best classes of hidden vectors, as JSON.

    python examples/serve.py predictor.pt
    curl localhost:8000/topk -H "Content-Type: application/json" -d '{"inputs": [[0.5, -1.0, ...]]}'

``torch.save(layer.predictor().state_dict(), "predictor.pt")`` makes the file. Several processes that serve it
share its memory. http://localhost:8000/docs describes the interface.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from slide_torch import Predictor


class Query(BaseModel):
    inputs: list[list[float]]


class Answer(BaseModel):
    values: list[list[float]]
    indices: list[list[int]]


def app_of(predictor: Predictor) -> FastAPI:
    app = FastAPI(title="slide_torch")

    @app.post("/topk")
    def topk(query: Query) -> Answer:  # in a thread of its own
        try:
            x = torch.tensor(query.inputs, dtype=predictor.weight.dtype)
            if not torch.isfinite(x).all():
                raise ValueError("inputs: expected finite numbers")
            found = predictor(x)
        except ValueError as error:  # also of rows of different or wrong widths
            raise HTTPException(422, str(error)) from None
        return Answer(values=found.values.tolist(), indices=found.indices.tolist())

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictor", type=Path, help="the state dict of a Predictor")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of each request; requests run side by side
    try:
        state = torch.load(args.predictor, mmap=True, weights_only=True)
        predictor = Predictor.from_state_dict(state)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))
    uvicorn.run(app_of(predictor), host=args.host, port=args.port, access_log=False)


if __name__ == "__main__":
    main()
