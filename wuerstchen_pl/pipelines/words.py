"""New words of a pipeline's text encoders, by textual inversion."""

from collections.abc import Sequence
from pathlib import Path

from wuerstchen_pl.formats.word_files import StoredWord, read_words
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.pipelines.lora import WithAdapters


class WithWords(WithAdapters):
    """The cascade with new words. ``save_pretrained`` saves the text encoders without them."""

    @property
    def _text_encoders(self) -> list[TextEncoder]:
        encoders = [self.prior.text_encoder, self.decoder.text_encoder]
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def words(self) -> list[str]:
        """The words that were loaded, or learned by the run that the pipeline was loaded from."""
        words = (word.text for encoder in self._text_encoders for word in encoder.words)
        return list(dict.fromkeys(words))

    def load_words(self, path: str | Path, *, word: str | None = None) -> None:
        """Add the words of a file of this package, diffusers, OneTrainer or ComfyUI.

        ``clip_g`` is for the text encoder of Stage C, and ``clip_h`` for that of Stage B. Vectors
        without these names are for the first of the two that has their width.

        Args:
            path: the file, or a folder or hub id with ``learned_embeds.safetensors``.
            word: how prompts spell it; None is as in the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or a word does not fit: no text encoder has the width of
                its vectors, it is a token of the vocabulary, or it is loaded already.
        """
        stored = read_words(path, word)
        encoders = [self._encoder_of(entry) for entry in stored]
        for encoder in dict.fromkeys(encoders):
            new = [e.word for e, used in zip(stored, encoders, strict=True) if used is encoder]
            encoder.set_words([*encoder.words, *new])

    def unload_words(self, word: str | None = None) -> None:
        """Remove a word, or all: the text encoders are as before.

        Raises:
            ValueError: if it is not loaded.
        """
        if word is not None and word not in self.words:
            raise ValueError(f"no word {word!r} is loaded; choose from {', '.join(self.words)}")
        for encoder in self._text_encoders:
            kept = [other for other in encoder.words if word not in (None, other.text)]
            encoder.set_words(kept)

    def _encoder_of(self, stored: StoredWord) -> TextEncoder:
        """The text encoder that a word is for."""
        if stored.tower == "clip_g":
            return self.prior.text_encoder
        if stored.tower == "clip_h":
            if self.decoder.text_encoder is None:
                raise ValueError(
                    f"{stored.word.text!r} is for Stage B (clip_h), which reads no text here; use "
                    "words for Stage C"
                )
            return self.decoder.text_encoder
        width = stored.word.vectors.shape[1]
        for encoder in self._text_encoders:
            if encoder.width == width:
                return encoder
        widths = " and ".join(str(encoder.width) for encoder in self._text_encoders)
        raise ValueError(
            f"the vectors of {stored.word.text!r} have a width of {width}, but the text encoders "
            f"of this model have {widths}; use a word of this model"
        )

    # As in diffusers

    def load_textual_inversion(
        self, path: str | Path | Sequence[str | Path], token: str | Sequence[str] | None = None
    ) -> None:
        """``load_words`` under diffusers' name, of one file or several."""
        paths = [path] if isinstance(path, str | Path) else list(path)
        tokens = [token] * len(paths) if token is None or isinstance(token, str) else list(token)
        for file, word in zip(paths, tokens, strict=True):
            self.load_words(file, word=word)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """``unload_words`` under diffusers' name, of one word or several."""
        for word in [tokens] if tokens is None or isinstance(tokens, str) else tokens:
            self.unload_words(word)
