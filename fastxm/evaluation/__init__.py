"""How good generated pictures are."""

from fastxm.evaluation.evaluator import FrechetJudge as FrechetJudge
from fastxm.evaluation.evaluator import evaluate as evaluate
from fastxm.evaluation.kernel_distances import cmmd as cmmd
from fastxm.evaluation.kernel_distances import kid as kid
from fastxm.evaluation.metrics import FeatureStatistics as FeatureStatistics
from fastxm.evaluation.metrics import frechet_distance as frechet_distance
from fastxm.evaluation.metrics import retrieval_recall as retrieval_recall
from fastxm.evaluation.redescription import evaluate_redescription as evaluate_redescription
from fastxm.evaluation.selfsup import evaluate_selfsup as evaluate_selfsup
from fastxm.evaluation.text import bleu as bleu
