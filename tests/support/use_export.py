"""What a stranger does with an exported directory, in whatever version of transformers runs this.

    python tests/support/use_export.py DIRECTORY ...

Prints a JSON list with one object for each directory.
"""

import json
import sys

import torch
import transformers

TEXTS = ["a", "the boat left"]


def use(directory: str) -> dict:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    one = tokenizer(TEXTS[1], return_tensors="pt")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(one.input_ids).logits
        generated = model.generate(**one, max_new_tokens=6, do_sample=False)
        padded = model.generate(**batch, max_new_tokens=3, do_sample=False)
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    return {
        "version": transformers.__version__,
        "loading": {key: sorted(map(str, value)) for key, value in loading.items() if value},
        "inputs": sorted(batch),
        "ids": one.input_ids[0].tolist(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "eos of generation": model.generation_config.eos_token_id,
        "logits": logits[0].tolist(),
        "generated": generated[0].tolist(),
        "padded": list(padded.shape),
        "pipeline": pipeline(TEXTS[1], max_new_tokens=3, do_sample=False)[0]["generated_text"],
        "chat": tokenizer.apply_chat_template(messages, tokenize=False)
        if tokenizer.chat_template
        else None,
        "decoded": tokenizer.decode(tokenizer("naïve 河").input_ids, skip_special_tokens=True),
    }


if __name__ == "__main__":
    print(json.dumps([use(directory) for directory in sys.argv[1:]]))
