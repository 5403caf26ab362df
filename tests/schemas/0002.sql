BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE datasets (
	name VARCHAR(63) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	digest VARCHAR(80) NOT NULL, 
	num_rows BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	create_time BIGINT NOT NULL, 
	parents TEXT NOT NULL, 
	job_id VARCHAR(63) NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "datasets" VALUES('chats','conversations','sha256:1',3,40,1795394450360632,'[]','');
CREATE TABLE events (
	job_id VARCHAR(63) NOT NULL, 
	sequence BIGINT NOT NULL, 
	create_time BIGINT NOT NULL, 
	payload TEXT NOT NULL, 
	PRIMARY KEY (job_id, sequence), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "events" VALUES('job-660e6d8721a3da0cc7069',1,1795394450368853,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d8721a3da0cc7069',2,1795394450377293,'{"type":"state_change","state":"RUNNING","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d8721a3da0cc7069',3,1795394450379573,'{"type":"log","message":"hello"}');
INSERT INTO "events" VALUES('job-660e6d8721a3da0cc7069',4,1795394450379573,'{"type":"progress","phase":"generating","step":3,"total_steps":null,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":null,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}');
INSERT INTO "events" VALUES('job-660e6d8721a3da0cc7069',5,1795394450382662,'{"type":"result","result":{"type":"generation","dataset":"made","digest":"sha256:0","num_conversations":10,"num_rejected":1,"rejections":{"DUPLICATE":1},"provider":"offline","language_model":"","usage":null}}');
INSERT INTO "events" VALUES('job-660e6d8721a3da0cc7069',6,1795394450384450,'{"type":"state_change","state":"SUCCEEDED","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d8726cc309b038d3',1,1795394450387381,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d8726cc309b038d3',2,1795394450391329,'{"type":"state_change","state":"RUNNING","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d8726cc309b038d3',3,1795394450394083,'{"type":"progress","phase":"training","step":7,"total_steps":9,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":1.5,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}');
INSERT INTO "events" VALUES('job-660e6d8726cc309b038d3',4,1795394450396517,'{"type":"state_change","state":"FAILED","attempt":1,"message":"loss is nan","error":{"kind":"KnowledgeEngineError","message":"loss is nan","reason":"NON_FINITE","violations":[],"retry_after_seconds":null,"metadata":{"step":"7"}}}');
INSERT INTO "events" VALUES('job-660e6d8729aecd2a5f6d2',1,1795394450399135,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d8729aecd2a5f6d2',2,1795394450403303,'{"type":"state_change","state":"CANCELLED","attempt":0,"message":"cancelled on request","error":null}');
INSERT INTO "events" VALUES('job-660e6d872b57ce1449a60',1,1795394450405890,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d872b57ce1449a60',2,1795394450409339,'{"type":"state_change","state":"RUNNING","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d872e4245c759f5f',1,1795394450417957,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d872ef1240abf25f',1,1795394450420650,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
CREATE TABLE jobs (
	id VARCHAR(63) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	spec TEXT NOT NULL, 
	result TEXT, 
	error TEXT, 
	progress TEXT, 
	create_time BIGINT NOT NULL, 
	start_time BIGINT, 
	end_time BIGINT, 
	attempt INTEGER NOT NULL, 
	crashes INTEGER NOT NULL, 
	creator VARCHAR(63) NOT NULL, 
	tracker_run TEXT, 
	last_sequence BIGINT NOT NULL, 
	worker_pid INTEGER, 
	worker_started FLOAT, 
	lease_expires FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('job-660e6d8721a3da0cc7069','generation','SUCCEEDED','{"catalogue":"shop","dataset":"made","num_conversations":10,"topics":[],"difficulty_level":"medium","include_product_data":true,"seed":42,"provider":null}','{"type":"generation","dataset":"made","digest":"sha256:0","num_conversations":10,"num_rejected":1,"rejections":{"DUPLICATE":1},"provider":"offline","language_model":"","usage":null}',NULL,'{"type":"progress","phase":"generating","step":3,"total_steps":null,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":null,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}',1795394450365030,1795394450375148,1795394450383576,1,0,'shop-a',NULL,6,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d8726cc309b038d3','training','FAILED','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":42}',NULL,'{"kind": "KnowledgeEngineError", "message": "loss is nan", "reason": "NON_FINITE", "violations": [], "retry_after_seconds": null, "metadata": {"step": "7"}}','{"type":"progress","phase":"training","step":7,"total_steps":9,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":1.5,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}',1795394450386144,1795394450389888,1795394450395918,1,0,'shop-a',NULL,4,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d8729aecd2a5f6d2','training','CANCELLED','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":1}',NULL,NULL,NULL,1795394450397961,NULL,1795394450402736,0,0,'shop-b',NULL,2,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d872b57ce1449a60','training','RUNNING','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":2}',NULL,NULL,NULL,1795394450404757,1795394450408306,NULL,1,0,'',NULL,2,4242,1700000000.5,1.79539448041534280774e+09);
INSERT INTO "jobs" VALUES('job-660e6d872e4245c759f5f','training','QUEUED','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":3}',NULL,NULL,NULL,1795394450416705,NULL,NULL,0,0,'shop-b',NULL,1,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d872ef1240abf25f','generation','QUEUED','{"catalogue":"shop","dataset":"more","num_conversations":20,"topics":[],"difficulty_level":"medium","include_product_data":true,"seed":42,"provider":null}',NULL,NULL,NULL,1795394450419496,NULL,NULL,0,0,'shop-a',NULL,1,NULL,NULL,NULL);
CREATE TABLE services (
	name VARCHAR(16) NOT NULL, 
	trouble TEXT NOT NULL, 
	update_time BIGINT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "services" VALUES('openai','OpenAI was slow',1795394450422158);
CREATE INDEX ix_jobs_state ON jobs (state);
COMMIT;
