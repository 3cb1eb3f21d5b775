import sys

from benchmarks import padding


def test_padding_is_counted():
    class Sized(list):
        epoch, transforms, rles, copy_paste = 0, None, None, 0.0
        files = property(lambda self: [("", size) for size in self])

        def set_epoch(self, epoch):
            self.epoch = epoch

        def size_of(self, _epoch, index):
            return self[index]

    assert padding.padding(Sized([(10, 20), (20, 10)]), 2, False, epochs=3) == (1.0, 0.0)
    assert padding.padding(Sized([(10, 20), (10, 20)]), 2, True, epochs=3) == (0.0, 1.0)
    # Two landscape and two portrait images: batches of one kind need no padding.
    assert padding.padding(Sized([(10, 20), (20, 10)] * 2), 2, True, epochs=3) == (0.0, 1.0)


def test_the_command_prints_its_table(coco_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.padding", "--quick", str(coco_folder(train=4))])
    padding.main()
    assert capsys.readouterr().out.count("| grouped") == 4
