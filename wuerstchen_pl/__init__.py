"""Train, fine-tune, sample and evaluate the Wuerstchen text-to-image cascade."""
