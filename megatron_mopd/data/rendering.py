"""Chat templates, rendered in a confined process and nowhere else: a template is a program of whoever made
the tokenizer, which may loop for ever or fill the memory, and Jinja's sandbox has been left before.

`transformers` does the rendering, as in `PreTrainedTokenizer.apply_chat_template`.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from megatron_mopd.confinement.server import Limits, serve

_LIMITS = Limits(memory_bytes=1 << 30, longest_answer=1 << 25)


def render(template: str, messages: list[dict[str, Any]], special_tokens: dict[str, str]) -> str:
    """The text of a conversation, with the opening of the assistant's turn; raises what the template does."""
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **special_tokens
    )
    return texts[0]


if __name__ == "__main__":
    # A worker renders one tokenizer's templates only, so what one rendering leaves behind is its own affair.
    serve({"render": render}, _LIMITS, checks_evaluation=False)
