"""Chooses the documents of our own task files, and writes their prompts."""

import random
from typing import Any

from datasets import Dataset

MOST_DOCUMENTS = 2000  # per split, as in MetaICL; the test set of amazon has 400,000
MOST_CHARACTERS = 1000  # per text; about the 256 tokens that MetaICL allows per demonstration

BLANK = "  _  ."


def sampled(dataset: Dataset) -> Dataset:
    """At most 2,000 documents, always the same ones; long texts are cut at their end."""
    if len(dataset) > MOST_DOCUMENTS:
        chosen = random.Random(0).sample(range(len(dataset)), MOST_DOCUMENTS)
        dataset = dataset.select(sorted(chosen))
    return Dataset.from_list([_cut(row) for row in dataset])


def race_articles(dataset: Dataset) -> Dataset:
    """One document per article: its questions, their options, and the number of each answer.

    The rows of `ehovy/race` are questions; those of one article follow each other.
    """
    articles: list[dict[str, Any]] = []
    for row in dataset:
        if not articles or articles[-1]["article"] != row["article"]:
            articles.append(
                {"article": row["article"], "questions": [], "options": [], "answers": []}
            )
        articles[-1]["questions"].append(row["question"])
        articles[-1]["options"].append(list(row["options"]))
        articles[-1]["answers"].append("ABCD".index(row["answer"]))
    return Dataset.from_list(articles)


def race_prompt(doc: dict[str, Any]) -> str:
    """The article, its questions but the last with their answers, and the last question.

    An answer completes a question that ends in a blank, and follows any other.
    """
    lines = [f"Article: {doc['article']}\n"]
    *answered, asked = zip(doc["questions"], doc["options"], doc["answers"], strict=True)
    for question, options, answer in answered:
        if question.endswith(BLANK):
            lines.append(f"{question.removesuffix(BLANK)} {options[answer]}")
        else:
            lines += [f"Question: {question}", f"Answer: {options[answer]}"]
    return "\n".join([*lines, asked[0]])


def _cut(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value[:MOST_CHARACTERS] if isinstance(value, str) else value
        for name, value in row.items()
    }
