"""lmopt itself, translating and recognising speech as users have it do."""

from lmopt_peer import LmoptPeer
from protocol import serve


class LmoptApplicationsPeer(LmoptPeer):
    """Whatever encoder-decoder `lmopt.Runtime` opens."""

    def transcribe(self, file: str, num_beams: int) -> str:
        """Write down what is said."""
        text: str = self._runtime.transcribe(file, num_beams=num_beams)
        return text

    def translate(self, sources: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        """Translate a batch of ids."""
        from lmopt.generation import GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens, num_beams=num_beams)
        return [one.token_ids for one in self._runtime.generate(sources, config)]


if __name__ == "__main__":
    serve(LmoptApplicationsPeer())
