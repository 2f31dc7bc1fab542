"""Checks of adapters and of rules, for our own tests and for those of others."""

from ._adapter import ADAPTER_CHECKS as ADAPTER_CHECKS
from ._adapter import check_adapter as check_adapter
from ._claims import Claims as Claims
from ._claims import under_rule as under_rule
from ._compare import assert_close as assert_close
from ._compare import assert_same_bits as assert_same_bits
from ._compare import numbers as numbers
from ._leaks import checking_leaks as checking_leaks
from ._one_by_one import one_by_one as one_by_one
from ._report import Check as Check
from ._report import CheckError as CheckError
from ._report import Report as Report
from ._report import Result as Result
from ._rule import RULE_CHECKS as RULE_CHECKS
from ._rule import check_rule as check_rule
from ._subject import Subject as Subject
from ._subject import built_in_subjects as built_in_subjects
from ._transparency import TRANSPARENCY_CHECKS as TRANSPARENCY_CHECKS
from ._wraps import identity as identity
