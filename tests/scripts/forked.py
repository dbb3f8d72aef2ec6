"""A DataLoader whose forked workers run a layer, after the parent ran one on a thread team."""

import torch

import fastcells.nn


class Encoded(torch.utils.data.Dataset):
    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return self.x.shape[1]

    def __getitem__(self, n):
        torch.set_num_threads(2)  # a worker begins with one
        with torch.no_grad():
            return self.layer(self.x)[0][:, n]


def main():
    torch.set_num_threads(2)
    torch.manual_seed(0)
    layer, x = fastcells.nn.LSTM(40, 90), torch.randn(30, 8, 40)
    with torch.no_grad():
        y, _ = layer(x)
    loader = torch.utils.data.DataLoader(Encoded(layer, x), batch_size=4, num_workers=2, multiprocessing_context="fork")
    found = torch.cat(list(loader))
    assert torch.equal(found, y.transpose(0, 1))
    with torch.no_grad():
        assert torch.equal(layer(x)[0], y)  # the parent's team is whole
    print("done")


if __name__ == "__main__":
    main()
