"""Texts for comparing next-token predictions under teacher forcing: prose, code, notes and conversations.

Written for this purpose. `CONVERSATIONS` go through the model's chat template, `PLAIN` as they are.
"""

PLAIN = [
    """The river had been rising since dawn, and by noon the lower road was under water. Mara counted the sandbags
again. There were forty-one, which was not enough, and the truck would not come back before dark. She thought of the
mill, of its wheel turning backwards in the flood, and of the old man who had refused to leave it. Somebody would have
to go. The dog lifted its head, as if it had heard her think, and then the lights went out along the whole valley. In
the kitchen the radio kept talking on its batteries about a bridge that had closed, and about schools. She took the
lamp from its hook, filled it, and wrote three lines on the back of an envelope, which she left beside the bread.""",
    """A sourdough starter is a mixture of flour and water in which wild yeast and bacteria live together. The yeast
makes carbon dioxide, which lifts the dough, and the bacteria make acids, which give the bread its taste and protect it
from mould. To keep a starter alive, discard about half of it once a day and replace what you took with equal weights
of flour and water. At room temperature it doubles within four to eight hours; in the refrigerator it needs to be fed
only once a week. If a layer of grey liquid forms on top, the starter is hungry: pour the liquid off or stir it in, and
feed it twice in a row. A starter that smells of acetone, or shows pink or orange streaks, should be thrown away.""",
    '''def merge_intervals(intervals):
    """Merge overlapping intervals and return them sorted by start."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def __len__(self):
        return len(self.items)
''',
    """# Release notes

## Version 2.4

- The importer reads files larger than 4 GB.
- Dates before 1970 are written in the right order.
- Fixed a crash when the search field was cleared while results were still loading.
- The settings page now says which settings need a restart.

## Known problems

Printing from the preview window ignores the paper size. As a workaround, save the document as a PDF and print that
file. We expect to fix this in version 2.5, together with the new layout of the toolbar.

| Platform | Minimum version | Installer |
|----------|-----------------|-----------|
| Windows  | 10              | setup.exe |
| macOS    | 12              | app.dmg   |
| Linux    | kernel 5.4      | app.deb   |
""",
    """The moon turns once on its axis in the same time in which it travels once around the earth, so that it always
shows us the same side. This is no accident. Tides raised by the earth in the young, still soft moon slowed its rotation
until the two periods were equal. Seen from the moon, therefore, the earth hangs almost still in the sky: it waxes and
wanes, and its continents turn past every twenty-four hours, but it neither rises nor sets. Only at the edge of the
visible side does it climb above the horizon and sink again, because the moon's orbit is not a perfect circle. The first
people to see an earthrise were the crew of Apollo 8, who came around the far side in December 1968.""",
]

CONVERSATIONS = [
    [
        {"role": "user", "content": "What is the difference between a virus and a bacterium?"},
        {
            "role": "assistant",
            "content": "Bacteria are single-celled organisms that can live and reproduce on their own. Many are "
            "harmless or even useful, such as those that help us digest food. Viruses are much smaller and are not "
            "cells: they consist of genetic material in a protein coat, and they can only multiply inside the cells "
            "of a host. Antibiotics work against bacteria, but they have no effect on viruses.",
        },
        {"role": "user", "content": "So why do doctors sometimes prescribe antibiotics for a cold?"},
        {
            "role": "assistant",
            "content": "A cold is caused by a virus, so antibiotics do not cure it. A doctor may prescribe them when "
            "a bacterial infection has developed on top of the cold, for example in the sinuses, the ears or the "
            "lungs. Taking antibiotics without such a reason does not help, can cause side effects, and makes it "
            "easier for resistant bacteria to spread.",
        },
    ],
    [
        {"role": "system", "content": "You are a careful assistant who answers in short sentences."},
        {"role": "user", "content": "Write a function in Python that counts the vowels in a string."},
        {
            "role": "assistant",
            "content": "Here is a function that counts the vowels in a string:\n\n```python\ndef count_vowels(text):\n"
            '    vowels = "aeiou"\n    return sum(1 for letter in text.lower() if letter in vowels)\n```\n\nIt '
            "converts the text to lower case first, so that capital letters are counted as well. For example, "
            '`count_vowels("Hello World")` returns 3.',
        },
    ],
    [
        {"role": "user", "content": "I have 3 apples and buy 2 bags with 6 apples each. I eat 4. How many are left?"},
        {
            "role": "assistant",
            "content": "You start with 3 apples. Two bags with 6 apples each are 2 x 6 = 12 apples, so you have "
            "3 + 12 = 15 apples. After you eat 4 of them, 15 - 4 = 11 apples are left.",
        },
        {"role": "user", "content": "Give me a short plan for learning to play the guitar in three months."},
        {
            "role": "assistant",
            "content": "Month 1: Learn how to hold the guitar, how to tune it, and the chords E, A, D, G and C. "
            "Practise for twenty minutes every day, and change between two chords slowly and cleanly.\n\nMonth 2: Add "
            "simple strumming patterns and play along with songs that use three or four chords.\n\nMonth 3: Learn the "
            "F chord, try fingerpicking, and play two complete songs from memory for a friend.",
        },
    ],
]
