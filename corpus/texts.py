"""The ids of a text file, for the trainers and evaluate.py: the documents are prepare.py's."""

import numpy as np

from corpus.documents import read_documents
from encoder import ENDOFTEXT


def read_text(path):  # -> [str], the documents
    """Read a file's documents, in any format of corpus/documents.py, without empty ones.

    <|endoftext|> separates them, in a line of its own, which is left out, or anywhere in a line.
    Line ends are part of the text and stay as they are. Raises ValueError or OSError, which name
    the file, if it cannot be read.
    """
    documents = []
    for document in read_documents(path):
        documents += filter(None, document.split(ENDOFTEXT))
    return documents


def encode_text(documents, encoder):  # [str] -> [n_ids] int32
    """Encode documents. The id of <|endoftext|> follows each of several, as in prepare.py's shards.

    It does not follow a single one, nor where the tokenizer has no <|endoftext|>.
    """
    arrays = []
    for document in documents:
        ids = encoder.encode(document)
        if len(documents) > 1 and encoder.endoftext is not None:
            ids.append(encoder.endoftext)
        arrays.append(np.array(ids, np.int32))
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
