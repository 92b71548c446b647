"""What a Trainer does with data: samplers, loaders, collators, columns."""

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import default_data_collator

from tests.compat.sides import Nio, behaviour, caught
from tests.compat.toys import AtBegin, Texts, Uneven, outcome, pad, perceptron, table, tokenizer


def _order(side, folder, data, **given):
    """The samples that the training itself asks for."""
    side.trained(folder, train_dataset=data, callbacks=[AtBegin(data.order.clear)], **given)
    return list(data.order)


@behaviour(nio=Nio.SAME, cases=({}, {"seed": 7}, {"data_seed": 7}, {"train_sampling_strategy": "sequential"}))
def order_of_samples(side, folder, changes):
    """The samples of two epochs, in their order."""
    return _order(side, folder, Texts(), max_steps=-1, num_train_epochs=2, **changes)


@behaviour(nio=Nio.SAME)
def order_of_a_second_training(side, folder):
    """The samples of two trainings by one Trainer, which draws them anew."""
    data = Texts()
    trainer = side.trainer(folder, train_dataset=data, callbacks=[AtBegin(lambda: data.order.append(-1))])
    trainer.train()
    trainer.train()
    trained = data.order[data.order.index(-1) :]
    return [index for index in trained if index != -1]


@behaviour(nio=Nio.SAME, cases=("group_by_length", "batch_rebalance", "random"))
def sampling_by_length(side, folder, strategy):
    """The samples of an epoch by each strategy, with the lengths of a tokenizer's ids."""
    changes = {"processing_class": tokenizer(), "data_collator": pad, "gradient_accumulation_steps": 2}
    return _order(side, folder, Uneven(), train_sampling_strategy=strategy, max_steps=4, **changes)


class Backwards(Sampler[int]):
    """From the last sample to the first, and the epochs that it was told."""

    def __init__(self, size):
        self.size = size
        self.epochs = []

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(reversed(range(self.size)))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


@behaviour(nio=Nio.SAME)
def sampler_is_overridden(side, folder):
    """A sampler of the user's decides the order."""

    class Own(side.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return Backwards(len(self.train_dataset))

    return _order(side, folder, Texts(), trainer_class=Own)


@behaviour(nio=Nio.NOT_RUN)
def loader_without_a_data_set(side, folder):
    """A `get_train_dataloader` of the user's needs no `train_dataset`."""

    class Own(side.Trainer):
        def get_train_dataloader(self):
            return DataLoader(Texts(20), batch_size=5, collate_fn=default_data_collator)

    return outcome(side.trained(folder, trainer_class=Own, train_dataset=None, max_steps=-1, num_train_epochs=2))


@behaviour()
def loader_is_overridden(side, folder):
    """A `get_train_dataloader` of the user's goes before the data set."""

    class Own(side.Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(Texts(40), batch_size=5, shuffle=True, collate_fn=default_data_collator)
            return self.accelerator.prepare(loader)

    return outcome(side.trained(folder, trainer_class=Own))


class Batches:
    """Batches without the data set that they come from."""

    def __init__(self, data):
        self.loader = DataLoader(data, batch_size=4, collate_fn=default_data_collator)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


@behaviour()
def loader_that_names_no_data_set(side, folder):
    """Loaders need batches and a length only."""

    class Own(side.Trainer):
        def get_train_dataloader(self):
            return Batches(self.train_dataset)

        def get_eval_dataloader(self, eval_dataset=None):
            return Batches(self.eval_dataset)

    trainer = side.trained(folder, trainer_class=Own)
    return [outcome(trainer), trainer.evaluate()["eval_loss"]]


@behaviour(cases=(True, False))
def last_batch(side, folder, dropped):
    """A last batch that is not full is used or dropped."""
    changes = {"dataloader_drop_last": dropped, "max_steps": -1, "num_train_epochs": 2}
    return outcome(side.trained(folder, train_dataset=Texts(34), **changes))


@behaviour()
def worker(side, folder):
    """A worker loads the samples of the training and of the evaluation."""
    trainer = side.trained(folder, dataloader_num_workers=1, max_steps=2)
    return [outcome(trainer), trainer.evaluate()["eval_loss"]]


@behaviour(cases={"table": table, "samples": Texts})
def unused_columns(side, folder, data):
    """Columns that the model does not take are removed."""
    trainer = side.trained(
        folder, model=perceptron(), train_dataset=data(32, colour=1, length=6), eval_dataset=data(8, colour=1)
    )
    return [outcome(trainer), trainer.evaluate()["eval_loss"]]


@behaviour(nio=Nio.NOT_RUN, cases={"table": table, "samples": Texts})
def unused_columns_are_kept(side, folder, data):
    """Columns that are kept reach the model, which does not know them."""
    changes = {"model": perceptron(), "remove_unused_columns": False}
    trainer = side.trainer(folder, train_dataset=data(32, colour=1), **changes)
    return caught(trainer.train, TypeError)


@behaviour()
def collator_takes_other_columns(side, folder):
    """A collator of the user's sees all columns where they are kept."""

    def collate(samples):
        batch = default_data_collator([{key: sample[key] for key in ("input_ids", "labels")} for sample in samples])
        return {**batch, "attention_mask": torch.tensor([[sample["shown"]] * 6 for sample in samples])}

    changes = {"remove_unused_columns": False, "data_collator": collate}
    return outcome(side.trained(folder, train_dataset=Texts(32, shown=1), **changes))


class Labelled(Texts):
    """Samples whose label has the name that only collators know."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {"input_ids": sample["input_ids"], "label": sample["labels"]}


@behaviour()
def label_gets_the_name_that_the_model_knows(side, folder):
    """The default collator calls `label` `labels`."""
    return outcome(side.trained(folder, train_dataset=Labelled()))


@behaviour()
def data_set_is_replaced(side, folder):
    """A data set that a script puts into the Trainer later is the one that is trained on."""
    trainer = side.trainer(folder, train_dataset=Texts(40))
    trainer.train_dataset = Labelled(36)
    trainer.eval_dataset = Texts(6)
    trainer.train()
    return [outcome(trainer), trainer.evaluate()["eval_loss"]]


@behaviour()
def shuffled_batches_are_those_of_the_global_generator(side, folder):
    """A seed that a script sets between Trainer and training decides the order."""
    trainer = side.trainer(folder)
    torch.manual_seed(123)
    trainer.train()
    return outcome(trainer)
