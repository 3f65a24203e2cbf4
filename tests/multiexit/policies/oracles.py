"""The policies in plain Python, row by row, and logits to try them on."""

import dataclasses
import math

import torch
from hypothesis import strategies as st

from gradalign.multiexit.policies import Budget, Entropy, MaxProbability, Patience, PatientConfidence


def softmax(z):
    exponentials = [math.exp(value - max(z)) for value in z]
    return [e / sum(exponentials) for e in exponentials]


def largest(z):
    return max(range(len(z)), key=lambda c: z[c])


# The policies as the papers tell them: one row, its exits one after the other. Each returns (exit, logits answered).


def budget(row, exit):
    return exit, row[exit - 1]


def entropy(row, threshold, normalized=False):
    for m, z in enumerate(row, 1):
        H = -sum(p * math.log(p) for p in softmax(z) if p > 0)
        if (H / math.log(len(z)) if normalized else H) < threshold:
            return m, z
    return len(row), row[-1]


def max_probability(row, threshold):
    confidences = [max(softmax(z)) for z in row]
    for m, confidence in enumerate(confidences, 1):
        if confidence >= threshold:
            return m, row[m - 1]
    return len(row), row[confidences.index(max(confidences))]


def patience(row, patience, tolerance=None):
    count = 0
    for m in range(2, len(row) + 1):
        before, now = row[m - 2], row[m - 1]
        agrees = largest(before) == largest(now) if tolerance is None else abs(now[0] - before[0]) < tolerance
        count = count + 1 if agrees else 0
        if count == patience:
            return m, now
    return len(row), row[-1]


def patient_confidence(row, threshold, patience, normalized=False):
    count = 0
    for m, z in enumerate(row, 1):
        H = -sum(p * math.log(p) for p in softmax(z) if p > 0)
        count = count + 1 if (H / math.log(len(z)) if normalized else H) < threshold else 0
        if count == patience:
            return m, z
    return len(row), row[-1]


ORACLES = {
    Budget: budget,
    Entropy: entropy,
    MaxProbability: max_probability,
    Patience: patience,
    PatientConfidence: patient_confidence,
}


def oracle(policy, logits):
    """Decide row by row in plain Python."""
    fields = dataclasses.asdict(policy)
    rows = [ORACLES[type(policy)](row, **fields) for row in logits.double().transpose(0, 1).tolist()]
    exits = torch.tensor([exit for exit, _ in rows], dtype=torch.int64)
    answers = torch.tensor([answer for _, answer in rows], dtype=logits.dtype).reshape(logits.shape[1:])
    return exits, answers


SOME_CLASSES = st.integers(2, 4)


@st.composite
def stacked_logits(draw, min_rows=0, classes=SOME_CLASSES):
    M, N, C = draw(st.integers(1, 6)), draw(st.integers(min_rows, 8)), draw(classes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    # The exits share a part, so that some agree and some do not.
    common, own = torch.randn(1, N, C, generator=generator), torch.randn(M, N, C, generator=generator)
    return draw(st.sampled_from([0.5, 3.0])) * (common + draw(st.sampled_from([0.3, 1.0])) * own)


CLASSIFYING = st.one_of(
    st.builds(Budget, exit=st.just(1)),
    st.builds(Entropy, threshold=st.floats(0, 1.5), normalized=st.booleans()),
    st.builds(MaxProbability, threshold=st.floats(0, 1.1)),
    st.builds(Patience, patience=st.integers(1, 6)),
    st.builds(PatientConfidence, threshold=st.floats(0, 1.5), patience=st.integers(1, 4), normalized=st.booleans()),
)
