"""Render chat templates, only ever in a confined process: a template is a program by the tokenizer's author,
which may loop forever or exhaust the memory, and Jinja's sandbox has been escaped before.

`transformers` does the rendering, as in `PreTrainedTokenizer.apply_chat_template`.
"""

from __future__ import annotations

import random
from datetime import datetime, tzinfo
from typing import Any

from transformers.utils import chat_template_utils

from megatron_mopd.confinement.server import WorkerLimits, serve

_LIMITS = WorkerLimits(memory_bytes=1 << 30, longest_answer=1 << 25)


class _Clock(datetime):
    """Replaces the clock that `transformers` uses; it cannot be given another one."""

    today: str

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.fromisoformat(cls.today)


def render(template: str, messages: list[dict[str, Any]], special_tokens: dict[str, str], date: str) -> str:
    """The text of a conversation, with the opening of the assistant's turn; raises whatever the template
    raises.

    The text is the same on every host and every day: `strftime_now` gives the beginning of `date` (ISO 8601),
    and Jinja's filter `random` has a fixed seed.
    """
    random.seed(0)
    _Clock.today = date
    chat_template_utils.datetime = _Clock  # only in this process, which does nothing else
    texts, _ = chat_template_utils.render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=True,
        **special_tokens,
    )
    return texts[0]


if __name__ == "__main__":
    # A worker renders the templates of only one tokenizer, so what one rendering leaves behind affects no
    # other.
    serve({"render": render}, _LIMITS, checks_evaluation=False)
