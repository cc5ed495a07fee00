"""Random predictions and targets for the tests of the loss, and its matched terms written out."""

import torch
import torch.nn.functional as F

from kmax_d2.modeling.matcher import VOID, Targets
from kmax_d2.modeling.predictor import Prediction

SIZE = (6, 10)
PIXELS = 60
CLASSES = 7


def areas_of(ids, segments):
    """Counts the pixels of each mask of id maps (B, P): (B, S)."""
    return (ids[:, :, None] == torch.arange(segments)).sum(1)


def random_targets(batch=2, pixels=PIXELS, segments=5, void=0.2):
    """Draws targets whose last image has one mask less than the others."""
    counts = torch.full((batch,), segments)
    counts[-1] -= 1
    ids = torch.stack([torch.randint(count, (pixels,)) for count in counts.tolist()])
    ids[torch.rand(batch, pixels) < void] = VOID
    labels = torch.randint(CLASSES, (batch, segments))
    labels[torch.arange(segments) >= counts[:, None]] = VOID
    return Targets(ids, labels, areas_of(ids, segments))


def random_prediction(batch=2, queries=8, classes=CLASSES, size=SIZE, channels=6):
    """Draws a prediction whose parts require gradients."""
    class_logits = torch.randn(batch, queries, classes + 1) * 2
    mask_logits = torch.randn(batch, queries, *size) * 2
    feature = F.normalize(torch.randn(batch, channels, *size), dim=1)
    return Prediction(class_logits.requires_grad_(), mask_logits.requires_grad_(), feature.requires_grad_())


def pairs_of(matching, image):
    """Lists the (segment, query) pairs of an image."""
    of_image = matching.image == image
    return list(zip(matching.segment[of_image].tolist(), matching.query[of_image].tolist(), strict=True))


def plain_dice(probability, mask, valid):
    """Dice of one query's probabilities and one mask, both (P,), as the matching computes it."""
    return 2 * (mask * probability).sum() / (mask.sum() + (probability * valid).sum() + 2e-5)


def plain_terms(prediction, targets, matching):
    """Class, mask and mask-id term of each image, with the softmax over all queries written out."""
    class_terms, mask_terms, id_terms = [], [], []
    queries, classes = prediction.class_logits.shape[1], prediction.class_logits.shape[2] - 1
    for image in range(len(targets.classes)):
        log_classes = prediction.class_logits[image].log_softmax(1)
        log_probability = prediction.mask_logits[image].flatten(1).log_softmax(0)
        probability = log_probability.exp()
        ids = targets.segment_ids[image]
        valid = (ids != VOID).float()
        label = dict.fromkeys(range(queries), classes)
        weight = {
            q: 0.25 * max(((probability[q] * (1 - valid)).sum() / (probability[q].sum() + 1e-5)).item(), 1e-5)
            for q in range(queries)
        }
        mask_term = torch.zeros(())
        cross_entropies = []
        for segment, query in pairs_of(matching, image):
            mask = (ids == segment).float()
            label[query] = targets.classes[image, segment].item()
            weight[query] = 0.75 * plain_dice(probability[query], mask, valid).item()
            p = probability[query] * valid
            dice = (2 * (mask * p).sum() + 1) / (mask.sum() + p.sum() + 1)
            mask_term = mask_term + (1 - dice) * log_classes[query, label[query]].exp().item()
            cross_entropies.append(-log_probability[query][ids == segment])
        class_terms.append(-sum(weight[q] * log_classes[q, label[q]] for q in range(queries)) / queries)
        mask_terms.append(mask_term * 0.75 / queries)
        cross_entropies = torch.cat(cross_entropies)
        id_terms.append(cross_entropies.sum() / len(cross_entropies))
    return torch.stack(class_terms), torch.stack(mask_terms), torch.stack(id_terms)
