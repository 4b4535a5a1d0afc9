"""Whether rows fit a model: what rendering them one by one would say, and most are not tokenised for it.

A prompt whose bytes cannot make `Renderer.max_length` tokens leaves room for an answer, and an answer with a word in it has tokens,
for most tokenizers (see `bounds`). What is left is tokenised in batches. Only a row that does not fit is rendered, for its error.
"""

from __future__ import annotations

from collections.abc import Sequence

from pharmacist_ray.data.bounds import token_bound
from pharmacist_ray.data.layouts import BadRow
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError


class Room:
    """Tells of rows whether they fit one model."""

    def __init__(self, renderer: Renderer) -> None:
        """Find out what can be known of the renderer's tokenizer without running it."""
        self.renderer = renderer
        self.bound = token_bound(renderer.tokenizer)

    def misfits(self, rows: Sequence[Row]) -> dict[int, BadRow]:
        """Return the places of the rows that do not fit, each with the reason, in order; as `misfit` of each row."""
        return {place: bad for place in self._doubtful(rows) if (bad := misfit(rows[place], self.renderer))}

    def _doubtful(self, rows: Sequence[Row]) -> Sequence[int]:
        """Return the places of rows in order: of all that do not fit, and of no others where the tokenizer can be asked in batches."""
        if not self.renderer.plain:
            return range(len(rows))
        doubtful: set[int] = set()
        prompts: list[tuple[int, str]] = []
        answers: list[tuple[int, str]] = []
        for place, row in enumerate(rows):
            try:
                prompt = self.renderer.prompt_text(row)
            except DataError:
                doubtful.add(place)
                continue
            if not 1 + self.bound.at_most(prompt) < self.renderer.max_length:  # 1 for a BOS
                prompts.append((place, prompt))
            if row.response and not self.bound.has_some(row.response):
                answers.append((place, row.response))
        chat = self.renderer.template == "chat"
        extra = self.renderer.tokenizer.bos_token_id is not None and not chat
        lengths = self._lengths([text for _, text in prompts], all_text=not chat)
        doubtful |= {p for (p, _), n in zip(prompts, lengths, strict=True) if n + extra >= self.renderer.max_length}
        lengths = self._lengths([text for _, text in answers], all_text=True)
        doubtful |= {p for (p, _), n in zip(answers, lengths, strict=True) if not n}
        return sorted(doubtful)

    def _lengths(self, texts: Sequence[str], *, all_text: bool) -> list[int]:
        """Return each text's number of tokens."""
        return list(map(len, self.renderer.many_ids(texts, all_text=all_text)))


def misfit(row: Row, renderer: Renderer) -> BadRow | None:
    """Return why a row cannot be rendered, None if it can; a row without an answer needs room for one."""
    try:
        if row.response:
            renderer.render(row)
        elif len(renderer.prompt_ids(row)) >= renderer.max_length:
            return BadRow("no_room", f"the prompt leaves no room for an answer within model.max_length={renderer.max_length}")
    except DataError as error:
        reasons = {"no room": "no_room", "control token": "control_token"}
        return BadRow(next((reasons[words] for words in reasons if words in str(error)), "unrenderable"), str(error))
    return None
