"""Sound into what a speech model reads, without torch: files, log-mel features, and the tokens that ask for a task."""

from lmopt.speech.audio import read_audio as read_audio
from lmopt.speech.features import PREPROCESSOR as PREPROCESSOR
from lmopt.speech.features import LogMel as LogMel
from lmopt.speech.features import write_preprocessor as write_preprocessor
from lmopt.speech.segments import Segment as Segment
from lmopt.speech.segments import segments as segments
from lmopt.speech.task import SpeechTask as SpeechTask
