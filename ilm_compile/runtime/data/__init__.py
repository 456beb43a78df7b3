"""Text to batches: tokens, documents packed into rows, and a resumable order of rows.

* text in memory: `pack_documents` -> `PackedText`;
* token files of prepare-data or InternLM, ``x.bin`` and ``x.bin.meta``: `TokenDataset.open`;
* conversations, of which the answers are learnt: `Conversations`;
* no data at all: `DummyDataset`.

Each is a `RowDataset`. `BatchIterator` (training) and `ValidationBatches` make batches of one, or
the `Part` of them that a rank works on.
"""

from ilm_compile.runtime.data.answers import label_answers as label_answers
from ilm_compile.runtime.data.batch_plan import BatchNumbers as BatchNumbers
from ilm_compile.runtime.data.batch_plan import BatchRamp as BatchRamp
from ilm_compile.runtime.data.batches import BatchIterator as BatchIterator
from ilm_compile.runtime.data.batches import ValidationBatches as ValidationBatches
from ilm_compile.runtime.data.chat import Chat as Chat
from ilm_compile.runtime.data.chat import chat_of as chat_of
from ilm_compile.runtime.data.conversations import Conversations as Conversations
from ilm_compile.runtime.data.dataset import IGNORED_LABEL as IGNORED_LABEL
from ilm_compile.runtime.data.dataset import TYPE_IDS as TYPE_IDS
from ilm_compile.runtime.data.dataset import Part as Part
from ilm_compile.runtime.data.dataset import RowDataset as RowDataset
from ilm_compile.runtime.data.dataset import labels_in_place as labels_in_place
from ilm_compile.runtime.data.documents import documents_from_files as documents_from_files
from ilm_compile.runtime.data.documents import documents_from_pydoc as documents_from_pydoc
from ilm_compile.runtime.data.dummy import DummyDataset as DummyDataset
from ilm_compile.runtime.data.packed_text import PackedText as PackedText
from ilm_compile.runtime.data.packed_text import pack_documents as pack_documents
from ilm_compile.runtime.data.prepare import prepare as prepare
from ilm_compile.runtime.data.shard import TokenShard as TokenShard
from ilm_compile.runtime.data.shard_folder import open_shards as open_shards
from ilm_compile.runtime.data.shard_folder import open_validation_shards as open_validation_shards
from ilm_compile.runtime.data.shard_writer import ShardWriter as ShardWriter
from ilm_compile.runtime.data.shard_writer import write_shard as write_shard
from ilm_compile.runtime.data.text_files import read_conversations as read_conversations
from ilm_compile.runtime.data.text_files import read_documents as read_documents
from ilm_compile.runtime.data.token_dataset import TokenDataset as TokenDataset
from ilm_compile.runtime.data.tokenizer import ByteTokenizer as ByteTokenizer
from ilm_compile.runtime.data.tokenizer import FileTokenizer as FileTokenizer
from ilm_compile.runtime.data.tokenizer import Tokenizer as Tokenizer
from ilm_compile.runtime.data.tokenizer import load_tokenizer as load_tokenizer
