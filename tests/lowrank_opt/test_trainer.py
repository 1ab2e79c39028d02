from __future__ import annotations

import pytest
import torch

from lowrank_opt import GaLoreAdamW8bit, build_param_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(folder):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    optimizer = GaLoreAdamW8bit(build_param_groups(model, rank=8, update_proj_gap=3), lr=1e-2, min_8bit_size=1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=100,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, schedule)), model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_saves_and_resumes_bit_for_bit(tmp_path):
    whole, reference = trainer(tmp_path)
    whole.train()
    resumed, model = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), model.parameters(), strict=True))
