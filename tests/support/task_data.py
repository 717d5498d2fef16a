"""Small documents for every task of the group, in the columns of its data set on the hub."""

import json
from pathlib import Path

from lory_jax.evaluation.harness.tasks.data import members

WORDS = ("red", "green", "blue", "north", "south", "east", "west", "small", "large", "old", "new")
DOCUMENTS = 20


def phrase(i: int) -> str:
    return f"{WORDS[i % 11]} {WORDS[(3 * i + 1) % 11]}"


def phrases(i: int, count: int) -> list[str]:
    return [phrase(i + k) for k in range(count)]


def document(task: str, i: int) -> dict:
    """Document i of a task."""
    letter, text = "ABCD"[i % 4], phrase(i)
    problems = [
        {"question": "It was  _  .", "answer": "B", "options": phrases(i, 4)},
        {"question": "What else?", "answer": "A", "options": phrases(i + 1, 4)},
        {"question": "Who?", "answer": letter, "options": phrases(i + 2, 4)},
    ]
    # The rows of ehovy/race are questions: here 2 of an article.
    article = f"The {phrase(i // 2)} house stood here."
    choices = {"text": phrases(i, 4), "label": list("ABCD")}
    return {
        "piqa": {
            "goal": f"Go {text}",
            "sol1": phrase(i + 1),
            "sol2": phrase(i + 2),
            "label": i % 2,
        },
        "social_iqa": {
            "context": text,
            "question": "Why?",
            **dict(zip(("answerA", "answerB", "answerC"), phrases(i, 3), strict=True)),
            "label": str(1 + i % 3),
        },
        "boolq": {"passage": text, "question": f"is it {text}", "idx": i, "label": i % 2},
        "hellaswag": {
            "activity_label": "Walking",
            "ctx_a": f"A {text}.",
            "ctx_b": "he",
            "endings": [f"{ending} [step] end." for ending in phrases(i, 4)],
            "label": str(i % 4),
        },
        "winogrande": {
            "sentence": f"The {text} _ was there.",
            "option1": "cat",
            "option2": "dog",
            "answer": str(1 + i % 2),
        },
        "race_middle": {
            "article": article,
            "question": "Who?" if i % 2 else "It was  _  .",
            "answer": letter,
            "options": phrases(i, 4),
        },
        "race": {"article": article, "problems": repr(problems)},
        "arc_easy": {"question": f"Which {text}?", "choices": choices, "answerKey": letter},
        "arc_challenge": {"question": f"Why {text}?", "choices": choices, "answerKey": letter},
        "nq_open": {"question": f"who is {text}", "answer": phrases(i, 2)},
        "triviaqa": {"question": f"Who is {text}", "answer": {"aliases": phrases(i, 2)}},
        "ag_news": {"text": text, "label": i % 4},
        "amazon": {"label": i % 2, "title": text, "content": phrase(i + 1)},
        "sst2": {"sentence": text, "label": i % 2, "idx": i},
        "yelp": {"text": text, "label": i % 2},
        "fever": {"input": text, "output": [{"answer": ("SUPPORTS", "REFUTES")[i % 2]}]},
        "mrpc": {"sentence1": text, "sentence2": phrase(i + 1), "label": i % 2, "idx": i},
    }[task]


def write_task_data(directory: Path) -> Path:
    """Writes every split that the group reads as JSON lines."""
    for task, item in members().items():
        for split in item["dataset_kwargs"]["splits"]:
            lines = [json.dumps(document(task, i)) for i in range(DOCUMENTS)]
            path = directory / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return directory
