"""Synthetic data with distilabel: two models write answers, a third model rates the answers.

Usage: synthetic_data.py URL [--writers A B] [--judge C] [--rows N] [--out FILE]
URL is the gateway's, such as http://127.0.0.1:8000/v1. Needs the packages `distilabel[openai]` and
`requests`. Prints the number of rows and of ratings; `--out` keeps the rows as JSON lines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import GroupColumns, LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration, UltraFeedback

COUNTRIES = ("Peru", "Chile", "Kenya", "Nepal", "Norway", "Japan", "Ghana", "Fiji")
RATING = r"Rating: [1-5]\nRationale: [A-Za-z ,.]{10,160}"


def model(url: str, name: str, **settings: object) -> OpenAILLM:
    """A model of the deployment; its requests take what interactive traffic leaves free."""
    return OpenAILLM(
        model=name,
        base_url=url,
        api_key="none",
        default_headers={"x-background": "1"},
        generation_kwargs=settings,
    )


def build(url: str, writers: list[str], judge: str, num_rows: int) -> Pipeline:
    """The pipeline: each writer answers each instruction, and the judge rates the answers."""
    instructions = [
        {"instruction": f"Write a sentence about {COUNTRIES[row % len(COUNTRIES)]}, number {row}."}
        for row in range(num_rows)
    ]
    # The judge's answer can be read whatever the model is: the gateway enforces its form.
    form = {"structured_outputs": {"regex": r"\n\n".join([RATING] * len(writers))}}
    with Pipeline("synthetic-data") as pipeline:
        load = LoadDataFromDicts(data=instructions)
        answers = [
            TextGeneration(
                name=f"writer_{number}",
                llm=model(url, name, max_new_tokens=40, temperature=0.8),
                input_batch_size=16,
            )
            for number, name in enumerate(writers)
        ]
        group = GroupColumns(
            columns=["generation", "model_name"], output_columns=["generations", "model_names"]
        )
        rate = UltraFeedback(
            name="judge",
            aspect="overall-rating",
            llm=model(url, judge, max_new_tokens=200, temperature=0.0, extra_body=form),
            input_batch_size=16,
        )
        load >> answers >> group >> rate
    return pipeline


def main() -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--writers", nargs="+", default=["writer-a", "writer-b"])
    parser.add_argument("--judge", default="judge")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    distiset = build(args.url, args.writers, args.judge, args.rows).run(use_cache=False)
    rows = distiset["default"]["train"].to_list()
    if args.out is not None:
        args.out.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    ratings = [rating for row in rows for rating in row["ratings"] if rating is not None]
    print(json.dumps({"rows": len(rows), "ratings": len(ratings)}))


if __name__ == "__main__":
    main()
