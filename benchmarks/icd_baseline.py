"""A baseline without a pre-trained model for the ICD-10-CM chapter task: TF-IDF and logistic regression.

    pip install scikit-learn; python benchmarks/icd_baseline.py

The features are word 1-2-grams and character 2-5-grams. Validation accuracy chooses the inverse regularisation C. Further
rows have other seeds of the split into training, validation and test data. They show how much the difficulty depends on
which categories are held out.
"""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union

from dcft_dist.config.toml import load_config
from dcft_dist.data.tasks import load_task


def accuracies(split_seed: int) -> tuple[float, float]:
    """Validation and test accuracy of the better C."""
    data = load_task(load_config("icd.toml", ["--task.split_seed", str(split_seed)]))
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    train = features.fit_transform(data.train.inputs)
    validation, test = features.transform(data.validation.inputs), features.transform(data.test.inputs)
    models = [LogisticRegression(C=c, max_iter=500).fit(train, data.train.labels) for c in (3.0, 30.0)]
    best = max(models, key=lambda m: m.score(validation, data.validation.labels))
    return best.score(validation, data.validation.labels), best.score(test, data.test.labels)


if __name__ == "__main__":
    print("| split seed | validation accuracy | test accuracy |\n|---|---|---|")
    used = load_config("icd.toml").task.split_seed
    for seed in range(6):
        validation, test = accuracies(seed)
        print(f"| {seed}{' (used)' if seed == used else ''} | {validation:.3f} | {test:.3f} |", flush=True)
