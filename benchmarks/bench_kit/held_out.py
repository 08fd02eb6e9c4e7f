"""Text that a trained model has never seen, as token ids to predict. Knows nothing of backends."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from dgnd.control.api import ChatMessage
from dgnd.text.assets import TextAssets

_DEMO_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "demo_model"
#: In the manner of the TinyStories that the small Llamas were trained on, written for this benchmark.
STORIES = Path(__file__).parent / "stories.txt"


@dataclass(frozen=True, slots=True)
class Window:
    """`ids` that a model sees at once, of which it is to predict those from `first` on."""

    ids: tuple[int, ...]
    first: int = 1


def demo_windows(model: Path) -> list[Window]:
    """One conversation each: a question that was kept out of the demo model's training, and its answer, which
    alone is to be predicted, as in training."""
    sys.path.append(str(_DEMO_SCRIPTS))
    import demo_data

    answers = {intent.id: intent.answer for intent in demo_data.load_intents()}
    text = TextAssets.load(model)
    windows = []
    for intent, question in demo_data.load_held_out():
        asked = text.encode_chat([ChatMessage("user", question)])
        said = [*text.encode_raw(answers[intent]), min(text.eos_token_ids)]
        windows.append(Window((*asked, *said), len(asked)))
    return windows


def text_windows(model: Path, file: Path, context: int) -> list[Window]:
    """The paragraphs of `file`, each cut into windows of at most `context` ids that begin as a text does."""
    text = TextAssets.load(model)
    windows = []
    for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
        ids = text.encode_raw(paragraph.strip())
        begin = ids[:1] if ids[:1] == [text.bos_token_id] else []
        rest = ids[len(begin) :]
        size = context - len(begin)
        windows += [Window((*begin, *rest[start : start + size])) for start in range(0, len(rest), size)]
    return [window for window in windows if len(window.ids) > 1]
