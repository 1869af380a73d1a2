"""The conformance kit: proves that a backend keeps the rules of `lmopt.contracts`.

It ships in the wheel so that a stranger's package can test itself:

    >>> from lmopt.testing import check_backend
    >>> print(check_backend("onnxruntime"))  # doctest: +SKIP

The tiny models that it runs are built in code, so it needs torch, and onnx for the formats that
are exported; the backend under test needs neither.
"""

from lmopt.evaluation import tolerances as tolerances
from lmopt.testing import models as models
from lmopt.testing.case import Case as Case
from lmopt.testing.case import Subject as Subject
from lmopt.testing.checks import ENGINE_CHECKS as ENGINE_CHECKS
from lmopt.testing.checks import SPEC_CHECKS as SPEC_CHECKS
from lmopt.testing.run import ConformanceReport as ConformanceReport
from lmopt.testing.run import check_backend as check_backend
from lmopt.testing.run import parametrize_backend_checks as parametrize_backend_checks
