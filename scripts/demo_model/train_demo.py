"""Train the bundled `demo` model from nothing: tokenizer, weights, and the two bundled texts.

    python scripts/demo_model/train_demo.py                              # everything, into this checkout
    python scripts/demo_model/train_demo.py --corpus DIR --prepare-only  # only collect the text of this interpreter
    python scripts/demo_model/train_demo.py --corpus DIR --out DIR       # train on text collected before

Writes into the checkout (or --out):
    apex4_quant/demo/    config, bf16 safetensors, tokenizer, training.json (what was done and reached)
    calib/bundled/       heldout.txt, calibration.txt

Seeded. The text is that of the interpreter that collects it (see demo_corpus.py), so another CPython gives another
model. Runs on CUDA when there is one (minutes), else on the CPU (hours).
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import time

import torch
from demo_corpus import split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20260608
VOCAB, CONTEXT, BATCH = 4096, 512, 16
PEAK_LR, WEIGHT_DECAY, WARMUP = 3e-3, 0.1, 100
PARAGRAPH_BREAK, DOCUMENT_BREAK = "\n\n", "\x00"  # the break between documents occurs in no text
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_corpus(folder: pathlib.Path | None) -> dict[str, list[str]]:
    """The split of demo_corpus.py: read from `folder` if it is there, else collected (and kept in `folder`)."""
    if folder is None:
        return split()
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for name, texts in split().items():
            (folder / f"{name}.txt").write_text(DOCUMENT_BREAK.join(texts), encoding="utf-8")
        (folder / "python-version").write_text(platform.python_version())
    return {path.stem: path.read_text("utf-8").split(DOCUMENT_BREAK) for path in sorted(folder.glob("*.txt"))}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream, documents separated by <|endoftext|>."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: torch.Tensor) -> float:
    model.eval()
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(loss_of(model, w[None].to(DEVICE)).item() for w in windows)
    model.train()
    return math.exp(total / len(windows))


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor) -> float:
    """What a model that knows only token frequencies reaches: the floor that "has learnt" is measured from."""
    counts = torch.bincount(train, minlength=VOCAB).double() + 1
    return math.exp(-(counts / counts.sum()).log()[test].mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2])
    parser.add_argument("--corpus", type=pathlib.Path, help="folder of collected text; made if it is not there")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dropout", type=float, default=0.35)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    started = time.time()

    parts = load_corpus(args.corpus)
    if args.prepare_only:
        return
    text_dir, model_dir = args.out / "calib" / "bundled", args.out / "apex4_quant" / "demo"
    for directory in (text_dir, model_dir):
        directory.mkdir(parents=True, exist_ok=True)
    for name in ("heldout", "calibration"):
        (text_dir / f"{name}.txt").write_text(PARAGRAPH_BREAK.join(parts[name]) + "\n", encoding="utf-8")

    tokenizer = train_tokenizer(parts["train"])
    streams = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    print({name: len(stream) for name, stream in streams.items()}, flush=True)

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=args.layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE)
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(
                lambda m, _, out: torch.nn.functional.dropout(out, args.dropout, training=m.training)
            )
    # Muon for the matrices of the layers, AdamW for embeddings and norms; both with AdamW's update size.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]

    train = streams["train"]
    steps_per_epoch = len(train) // (CONTEXT * BATCH)
    steps = args.epochs * steps_per_epoch
    best, best_state, step = math.inf, None, 0
    model.train()
    for epoch in range(args.epochs):
        # A new phase every epoch, so the windows are not the same ones again.
        phase = int(torch.randint(CONTEXT, ()))
        windows = train[phase : phase + (len(train) - phase) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        for batch in torch.randperm(len(windows)).split(BATCH)[:steps_per_epoch]:
            if len(batch) < BATCH:
                continue
            rate = min(step / WARMUP, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            loss = loss_of(model, windows[batch].to(DEVICE))
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = PEAK_LR * rate
                optimizer.step()
            step += 1
        validation = perplexity(model, streams["validation"])
        if validation < best:
            best, best_state = validation, {k: v.detach().clone() for k, v in model.state_dict().items()}
        print(f"epoch {epoch + 1:3} step {step:5} loss {loss.item():.3f} validation {validation:8.3f} "
              f"{time.time() - started:6.0f} s", flush=True)  # fmt: skip

    model.load_state_dict(best_state)
    model.to(torch.bfloat16).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    report = {
        "seed": SEED,
        "corpus_python": ((args.corpus / "python-version").read_text() if args.corpus else platform.python_version()),
        "torch": torch.__version__.split("+")[0],
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "epochs": args.epochs,
        "dropout": args.dropout,
        "steps": step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {name: len(stream) for name, stream in streams.items()},
        "validation_perplexity": round(best, 3),
        "heldout_perplexity_bf16": round(perplexity(model, streams["heldout"]), 3),
        "heldout_unigram_perplexity": round(unigram_perplexity(train, streams["heldout"]), 3),
    }
    (model_dir / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
