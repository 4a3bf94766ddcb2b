"""What is measured beside the rewards: Fréchet distances, caption checks, ranks.

Shape suffixes: B, N images, D features, P prompts, S candidates of a prompt.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from scipy.stats import rankdata

from evaluation.bootstrap import Estimate, statistic

if TYPE_CHECKING:
    from data.scenes import Scene

CLIP_TOKENS = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}


def frechet_distance(x_ND: torch.Tensor, y_MD: torch.Tensor, weights_N=None, weights_M=None) -> float:
    """|μ_x - μ_y|² + tr(C_x + C_y - 2 (C_x C_y)^½), the squared 2-Wasserstein distance of two Gaussians.

    With C = AᵀA the last trace is the sum of the singular values of A_x A_yᵀ: exact without a matrix root, also with
    fewer images than features. Covariances are divided by N - 1, as in torch-fidelity.

    Args:
        x_ND, y_MD: features.
        weights_N, weights_M: of a bootstrap, summing to 1; equal by default.

    Source: Heusel et al., arXiv 1706.08500.
    """
    mean_x, root_x = _moments(x_ND, weights_N)
    mean_y, root_y = _moments(y_MD, weights_M)
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross)


def _moments(x_ND: torch.Tensor, weights_N: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, and a root A of the covariance with as few rows as possible: C = AᵀA."""
    x_ND = x_ND.double()
    count = len(x_ND)
    weights_N = torch.full((count,), 1 / count, dtype=torch.float64) if weights_N is None else weights_N
    mean_D = weights_N @ x_ND
    root = (x_ND - mean_D) * (weights_N * count / (count - 1)).sqrt()[:, None]
    return mean_D, torch.linalg.qr(root, mode="r").R if count > x_ND.shape[1] else root


def frechet(x_ND: torch.Tensor, y_MD: torch.Tensor, paired: bool) -> Estimate:
    """A Fréchet distance with its bootstrap; `paired` draws the prompts of both sets together."""
    return statistic(lambda w: frechet_distance(x_ND, y_MD, w, w if paired else None), len(x_ND))


def caption_check(labels_BHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """1 where a segmentation map answers every question of its prompt right, else 0; float32 (B,).

    Raises:
        ValueError: a prompt is none of the miniature world.
    """
    from data.scenes import check

    labels_BHW = labels_BHW.cpu()
    return torch.tensor([float(all(check(*pair).values())) for pair in zip(labels_BHW, prompts, strict=True)])


def edit_check(
    images_BCHW: torch.Tensor, labels_BHW: torch.Tensor, sources: "Sequence[Scene]", edited: "Sequence[Scene]"
) -> torch.Tensor:
    """1 where an edit is done and the rest is untouched, else 0; float32 (B,).

    Args:
        images_BCHW: in [0, 1].
        labels_BHW: their segmentation maps.
        sources, edited: scenes before the edit, and those that it should lead to.
    """
    from data.edit_check import check_edit

    rows = zip(images_BCHW.cpu(), labels_BHW.cpu(), sources, edited, strict=True)
    return torch.tensor([float(all(check_edit(*row).values())) for row in rows])


def spearman(x_PS: torch.Tensor, y_PS: torch.Tensor) -> torch.Tensor:
    """Rank correlation of each row, float64 (P,); ties share their mean rank, a constant row correlates 0."""
    ranks = [torch.from_numpy(rankdata(values_PS.numpy(), axis=1)) for values_PS in (x_PS, y_PS)]
    x, y = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(norm > 0, (x * y).sum(1) / norm.clamp_min(1e-12), 0.0)


def top1_agreement(x_PS: torch.Tensor, y_PS: torch.Tensor) -> torch.Tensor:
    """1 where the best candidate by x is the best by y, float64 (P,)."""
    return (x_PS.argmax(1) == y_PS.argmax(1)).double()


class ClipScorer:
    """Cosine of picture and prompt under a CLIP model: what ranks candidates.

    Args:
        model: hub id or local folder with tokenizer and image processor.
        device: where it runs.
        reward: the same model as a reward, if it is loaded already.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu", reward=None):
        from transformers import AutoTokenizer

        from rewards import load_reward

        self.reward = reward or load_reward("clip", model=model, device=device)  # the image side, and all checks
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts: dict[str, torch.Tensor] = {}  # embedded once

    @torch.no_grad()
    def _embed(self, prompt: str) -> torch.Tensor:
        if prompt not in self.prompts:
            network = self.reward.network
            length = network.config.text_config.max_position_embeddings
            tokens = self.tokenizer([prompt], max_length=length, **CLIP_TOKENS).to(self.reward.device)
            inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
            self.prompts[prompt] = network.get_text_features(**inputs).pooler_output[0].float()
        return self.prompts[prompt]

    def __call__(self, features_BD: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """float32 (B,) on the CPU, from the reward's features of the pictures."""
        text_BD = torch.stack([self._embed(prompt) for prompt in prompts]).to(features_BD.device)
        return torch.cosine_similarity(features_BD.float(), text_BD, dim=-1).cpu()


class InceptionFeatures:
    """The pool features of torch-fidelity's Inception network, with which published FIDs are computed.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: its weights are neither in torch's hub cache nor can they be fetched.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("fid needs torch-fidelity: pip install -e '.[metrics]', or leave it off.") from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
        except OSError as error:
            raise OSError(
                f"The Inception weights of torch-fidelity cannot be fetched: {error}. Set fid off."
            ) from error
        self.device = device

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """float32 (B, 2048) on the CPU."""
        return self.network(images_BCHW.to(self.device).mul(255).round().to(torch.uint8))[0].float().cpu()
