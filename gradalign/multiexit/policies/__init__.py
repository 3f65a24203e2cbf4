"""The exit policies, how to set one to a wanted speed-up, and how to store one."""

from gradalign.multiexit.inference import Decision, Policy
from gradalign.multiexit.policies.agreement import Patience
from gradalign.multiexit.policies.budget import Budget
from gradalign.multiexit.policies.confidence import ConfidencePolicy, Entropy, MaxProbability, PatientConfidence
from gradalign.multiexit.policies.speed import calibrate
from gradalign.multiexit.policies.stored import from_dict, to_dict
from gradalign.multiexit.policies.temperatures import Calibrated, calibrate_temperatures

__all__ = [
    "Budget",
    "Calibrated",
    "ConfidencePolicy",
    "Decision",
    "Entropy",
    "MaxProbability",
    "Patience",
    "PatientConfidence",
    "Policy",
    "calibrate",
    "calibrate_temperatures",
    "from_dict",
    "to_dict",
]
